//! Arrays of a stream. All work on them is in it, in order, so what nobody holds any more is handed out again at once.

use super::driver::{Allocation, Device, Said};
use cubecl_core::server::BufferBinding;
use cubecl_server::memory_management::{ManagedMemoryHandle, ManagedMemoryId};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Bytes from which on an array is a multiple of so many, and not of an eighth of a power of two.
const LARGE: u64 = 2 << 20;
/// Fewest bytes of an array.
const SMALLEST: u64 = 512;
/// New arrays between two looks for such as nobody holds, if the last look found none.
const PATIENCE: usize = 64;

/// An array that a client holds.
#[derive(Debug)]
struct Held {
    /// Two of its references are ours: this one, and that of the handle itself.
    handle: ManagedMemoryHandle,
    allocation: Arc<Allocation>,
    bytes: u64,
}

/// The arrays of a stream.
#[derive(Debug, Default)]
pub(super) struct Memory {
    held: HashMap<ManagedMemoryId, Held>,
    /// By size, what nobody holds.
    free: BTreeMap<u64, Vec<Arc<Allocation>>>,
    /// What launches that are being recorded work in.
    recording: Option<HashMap<u64, Arc<Allocation>>>,
    /// New arrays since the last look, and whether that one found none.
    made: usize,
    in_vain: bool,
    reserved: u64,
}

/// Sizes that are handed out: few, so that arrays serve again.
fn rounded(bytes: u64) -> u64 {
    let step = match bytes {
        0..LARGE => bytes.next_power_of_two() / 8,
        _ => LARGE,
    };
    bytes.max(SMALLEST).next_multiple_of(step.max(SMALLEST))
}

impl Memory {
    /// An array of `bytes` for `handle`.
    pub(super) fn allocate(
        &mut self,
        device: &Device,
        handle: ManagedMemoryHandle,
        bytes: u64,
    ) -> Said<()> {
        let size = rounded(bytes);
        let is_worth_it = !self.in_vain || self.made >= PATIENCE || size >= LARGE;
        if !self.fits(size) && is_worth_it {
            self.sweep();
        }
        let allocation = match self.take(size) {
            Some(allocation) => allocation,
            None => self.fetch(device, size)?,
        };
        let id = handle.clone().binding().id();
        self.held.insert(id, Held { handle, allocation, bytes });
        Ok(())
    }

    /// A quarter more than is wanted serves too.
    fn fits(&self, size: u64) -> bool {
        self.free.range(size..=size + size / 4).next().is_some()
    }

    fn take(&mut self, size: u64) -> Option<Arc<Allocation>> {
        let (&found, all) = self.free.range_mut(size..=size + size / 4).next()?;
        let allocation = all.pop();
        if all.is_empty() {
            self.free.remove(&found);
        }
        allocation
    }

    /// More of the device's memory.
    fn fetch(&mut self, device: &Device, size: u64) -> Said<Arc<Allocation>> {
        self.made += 1;
        let allocation = device.allocate(size)?;
        self.reserved += allocation.bytes;
        Ok(Arc::new(allocation))
    }

    /// Finds what nobody holds any more.
    fn sweep(&mut self) {
        let (free, recording, before) = (&mut self.free, &self.recording, self.held.len());
        self.held.retain(|_, held| {
            let (is_held, allocation) = (!held.handle.is_free(), &held.allocation);
            // What recorded launches work in is theirs, but for those that are being recorded with them.
            let here = recording.as_ref().is_some_and(|r| r.contains_key(&allocation.address));
            if !is_held && Arc::strong_count(allocation) == 1 + usize::from(here) {
                free.entry(allocation.bytes).or_default().push(allocation.clone());
            }
            is_held
        });
        (self.made, self.in_vain) = (0, self.held.len() == before);
    }

    /// Gives back to the device what nobody holds.
    pub(super) fn give_back(&mut self) {
        self.sweep();
        // Recorded launches still need theirs.
        let recording = self.recording.as_ref();
        for (_, all) in std::mem::take(&mut self.free) {
            for allocation in all {
                if recording.is_some_and(|r| r.contains_key(&allocation.address)) {
                    self.free.entry(allocation.bytes).or_default().push(allocation);
                } else {
                    self.reserved -= allocation.bytes;
                }
            }
        }
    }

    pub(super) fn has(&self, binding: &BufferBinding) -> bool {
        self.held.contains_key(&binding.memory.id())
    }

    /// Where the bytes of a binding are, and how many.
    pub(super) fn find(&mut self, binding: &BufferBinding) -> Said<(u64, u64)> {
        let held = self.held.get(&binding.memory.id()).ok_or("there was no memory for an array")?;
        let start = binding.offset_start.unwrap_or(0);
        let end = binding.size - binding.offset_end.unwrap_or(0);
        if start > end || end > held.bytes {
            return Err(format!("bytes {start} to {end} of an array of {}", held.bytes));
        }
        if let Some(recording) = &mut self.recording {
            recording.insert(held.allocation.address, held.allocation.clone());
        }
        Ok((held.allocation.address + start, end - start))
    }

    pub(super) fn begin_recording(&mut self) {
        self.recording = Some(HashMap::new());
    }

    /// What the recorded launches work in, which from now on is theirs.
    pub(super) fn end_recording(&mut self) -> Vec<Arc<Allocation>> {
        let recording = self.recording.take().unwrap_or_default();
        for all in self.free.values_mut() {
            all.retain(|allocation| !recording.contains_key(&allocation.address));
        }
        self.free.retain(|_, all| !all.is_empty());
        recording.into_values().collect()
    }

    /// Takes what recorded launches worked in.
    pub(super) fn take_back(&mut self, memory: Vec<Arc<Allocation>>) {
        for allocation in memory {
            if Arc::strong_count(&allocation) == 1 {
                self.free.entry(allocation.bytes).or_default().push(allocation);
            }
        }
    }

    /// Arrays, their bytes, and bytes of the device.
    pub(super) fn usage(&mut self) -> (u64, u64, u64) {
        self.sweep();
        let bytes = self.held.values().map(|held| held.bytes).sum();
        (self.held.len() as u64, bytes, self.reserved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_few_and_waste_little() {
        for bytes in [1, 511, 512, 513, 4097, 100_000, LARGE - 1, LARGE, LARGE + 1, 5 * LARGE + 3] {
            let size = rounded(bytes);
            assert!(size >= bytes && size.is_multiple_of(SMALLEST), "{bytes}: {size}");
            assert!(
                size <= SMALLEST.max(bytes + bytes / 8 + SMALLEST).max(bytes + LARGE),
                "{bytes}: {size}"
            );
            assert_eq!(rounded(size), size);
        }
    }
}
