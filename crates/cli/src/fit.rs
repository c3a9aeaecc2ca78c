//! Whether a model fits, before any of it is placed: what it needs, what is free, and what to do.

use crate::{console, exit};
use anyhow::Result;
use marlin_checkpoint::{Checkpoint, CheckpointError};
use marlin_cpu::system::{self, Limit};
use marlin_engine::{EngineOptions, evaluate};
use marlin_models::{ModelSpec, Source, scratch_bytes, weight_memory};
use marlin_tensor::{Backend, CacheType};

/// What a model is loaded for.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    /// Tokens that its cache holds.
    pub tokens: usize,
    /// Element type of the cache.
    pub cache_type: CacheType,
    /// Most rows of a forward pass.
    pub rows: usize,
    /// Most rows of logits of a pass.
    pub outputs: usize,
}

impl Use {
    /// To run an engine with `options`.
    ///
    /// # Errors
    /// When these are out of range.
    pub fn engine(options: &EngineOptions, spec: &ModelSpec) -> Result<Self> {
        let tokens = options.sizes(spec.max_position_embeddings)?.1 * options.block_size;
        let prompt = options.prefill_chunk.max(options.mixed_chunk).min(tokens);
        let (rows, outputs) = (prompt + options.max_batch, options.max_batch);
        Ok(Self { tokens, cache_type: options.cache_type, rows, outputs })
    }

    /// To score texts of up to `tokens` tokens.
    pub fn reading(tokens: usize, cache_type: CacheType, spec: &ModelSpec) -> Self {
        let (rows, outputs) = evaluate::rows_per_pass(spec.vocab_size);
        Self { tokens, cache_type, rows: rows.min(tokens), outputs: outputs.min(tokens) }
    }
}

/// Bytes that a model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Weights in the form that the backend holds them.
    pub weights: u64,
    /// Weights that the processor reads where they lie in mapped files, which takes no memory that the system cannot have back.
    pub in_place: u64,
    /// Keys and values.
    pub cache: u64,
    /// A forward pass, at most.
    pub scratch: u64,
}

impl Need {
    /// What `spec` of `checkpoint` takes on `backend`.
    ///
    /// # Errors
    /// When a matrix is missing, shaped otherwise, or in no known format.
    pub fn of(
        checkpoint: &Checkpoint,
        spec: &ModelSpec,
        backend: &dyn Backend,
        usage: &Use,
    ) -> Result<Self> {
        let weights = weight_memory(checkpoint, spec, backend)?;
        let has_mtp = Source::new(checkpoint).has_mtp(spec);
        let token = spec.cache_spec(has_mtp, 1, 1, usage.cache_type).bytes_per_token() as u64;
        Ok(Self {
            weights: weights.bytes,
            in_place: weights.in_place_bytes,
            cache: token.saturating_mul(usage.tokens as u64),
            scratch: scratch_bytes(spec, usage.rows, usage.outputs),
        })
    }

    /// All that must be there at once.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.cache).saturating_add(self.scratch)
    }

    /// Refuses what has no room, which the model's `name` is told with.
    ///
    /// # Errors
    /// With the code of what does not fit.
    pub fn check(&self, name: &str, room: &Room) -> Result<()> {
        if self.total() <= room.bytes {
            return Ok(());
        }
        let bytes = console::bytes;
        let advice = match self.total() - self.cache <= room.bytes {
            true => "take a smaller cache (--context, --cache-type q8)",
            false => "take fewer bits, a smaller model or another --device",
        };
        let message = format!(
            "{name} does not fit: it needs {} (weights {}, cache {}, scratch {}) and {} {}; {advice}",
            bytes(self.total()),
            bytes(self.weights),
            bytes(self.cache),
            bytes(self.scratch),
            bytes(room.bytes),
            room.whose
        );
        Err(exit::coded(exit::DOES_NOT_FIT, message))
    }

    /// What to say of a model that fits, but not into memory.
    pub fn slow(&self, room: &Room) -> Option<String> {
        let available = room.memory?;
        let bytes = console::bytes;
        if self.total() > available {
            return Some(format!(
                "note: {} are needed and {} of memory are available; the rest is swapped, which is slow",
                bytes(self.total()),
                bytes(available)
            ));
        }
        let left = available - self.total();
        (self.in_place > left).then(|| {
            format!(
                "note: {} of weights are read from the file where they lie and {} of memory are left for them; the rest is read again for every token, which is slow",
                bytes(self.in_place),
                bytes(left)
            )
        })
    }
}

/// What is free.
#[derive(Debug, Clone)]
pub struct Room {
    /// Bytes that can be had.
    pub bytes: u64,
    /// Of what.
    whose: String,
    /// Of the process's memory, those that are had without swapping.
    memory: Option<u64>,
}

impl Room {
    /// On the device of `backend`; `None` where nobody says.
    pub fn of(backend: &dyn Backend) -> Option<Self> {
        if let Some(memory) = backend.memory() {
            let whose = format!("are free on {}", backend.name());
            return Some(Self { bytes: memory.available_bytes()?, whose, memory: None });
        }
        Self::of_process()
    }

    /// In the memory of this process; `None` where the system does not say.
    fn of_process() -> Option<Self> {
        let free = system::free()?;
        let whose = match free.limit {
            Limit::Machine => "of memory are free",
            Limit::Group => "are left of what the control group of this process may take",
            Limit::Addresses => "of addresses are left (ulimit -v)",
            Limit::Data => "of private memory are left (ulimit -d)",
        };
        let whose = whose.to_owned();
        Some(Self { bytes: free.bytes, whose, memory: system::available_bytes() })
    }

    /// Bytes that can be had without swapping.
    pub fn unswapped(&self) -> u64 {
        self.memory.map_or(self.bytes, |memory| memory.min(self.bytes))
    }
}

/// Why a model does not open, with the numbers where its file finds no room among the addresses of this process.
pub fn unopened(error: CheckpointError) -> anyhow::Error {
    if let CheckpointError::Io { path, source } = &error
        && source.kind() == std::io::ErrorKind::OutOfMemory
        && let (Ok(file), Some(room)) = (std::fs::metadata(path), Room::of_process())
    {
        let (size, left) = (console::bytes(file.len()), console::bytes(room.bytes));
        let message = format!("{}: {size} to be mapped, {left} {}", path.display(), room.whose);
        return exit::coded(exit::DOES_NOT_FIT, message);
    }
    anyhow::Error::from(error).context("cannot open the model")
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEED: Need =
        Need { weights: 5_000_000_000, in_place: 0, cache: 700_000_000, scratch: 300_000_000 };

    fn room(bytes: u64, memory: Option<u64>) -> Room {
        Room { bytes, whose: "are free on gpu".to_owned(), memory }
    }

    #[test]
    fn what_has_no_room_is_refused_with_the_numbers() {
        assert!(NEED.check("m", &room(6_000_000_000, None)).is_ok());
        let said = |bytes| NEED.check("m", &room(bytes, None)).unwrap_err().to_string();
        assert_eq!(
            said(5_999_999_999),
            "m does not fit: it needs 6.00 GB (weights 5.00 GB, cache 700 MB, scratch 300 MB) and 6.00 GB are free on gpu; \
             take a smaller cache (--context, --cache-type q8)"
        );
        assert!(
            said(5_299_999_999).ends_with("take fewer bits, a smaller model or another --device")
        );
    }

    #[test]
    fn what_memory_does_not_hold_is_told() {
        let note = |need: Need, available| need.slow(&room(9_000_000_000, available));
        assert_eq!(note(NEED, None), None);
        assert_eq!(note(NEED, Some(6_000_000_000)), None);
        assert!(note(NEED, Some(5_000_000_000)).unwrap().contains("swapped"));
        let mapped = Need { in_place: 2_000_000_000, ..NEED };
        assert_eq!(note(mapped, Some(8_000_000_000)), None);
        let said = note(mapped, Some(7_000_000_000)).unwrap();
        assert!(
            said.contains("2.00 GB of weights") && said.contains("1.00 GB of memory"),
            "{said}"
        );
    }
}
