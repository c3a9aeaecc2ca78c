//! What the operating system says of the machine's memory and of this process: Linux in `/proc` and `/sys/fs/cgroup`, macOS by
//! `sysctl` and `proc_pid_rusage`. Nothing is known elsewhere.

#[cfg(any(target_os = "linux", test))]
mod linux;

/// Memory of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resident {
    /// Bytes in memory now, files that are read in place included.
    pub bytes: u64,
    /// The most that ever were.
    pub most_bytes: u64,
    /// Bytes of no file. macOS counts what it has compressed, too.
    pub own_bytes: u64,
}

/// What bounds the memory that a process can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The machine's memory and swap space.
    Machine,
    /// That of a control group: a container's, a service's.
    Group,
    /// Addresses (`ulimit -v`), of which mapped files take their share.
    Addresses,
    /// Private writable memory (`ulimit -d`).
    Data,
}

/// Memory that this process can still take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Free {
    /// Bytes, swap space included.
    pub bytes: u64,
    /// What they are bounded by.
    pub limit: Limit,
}

/// The most that this process can still take, if need be by swapping; `None` where the system does not say.
pub fn free() -> Option<Free> {
    platform::free()
}

/// Bytes that the system, or the control group that this process is in, can still give out without swapping; `None` where it does not say.
pub fn available_bytes() -> Option<u64> {
    platform::available_bytes()
}

/// Bytes of memory of the machine; `None` where the system does not say.
pub fn physical_bytes() -> Option<u64> {
    platform::physical_bytes()
}

/// Memory of this process; `None` where the system does not say.
pub fn resident() -> Option<Resident> {
    platform::resident()
}

#[cfg(target_os = "linux")]
mod platform {
    use super::linux::System;
    use super::{Free, Resident};

    const SYSTEM: System<'static> = System { read: &|path| std::fs::read_to_string(path).ok() };

    pub fn available_bytes() -> Option<u64> {
        SYSTEM.available_bytes()
    }

    pub fn free() -> Option<Free> {
        SYSTEM.free()
    }

    pub fn physical_bytes() -> Option<u64> {
        SYSTEM.field("/proc/meminfo", "MemTotal:")
    }

    pub fn resident() -> Option<Resident> {
        let status = |name| SYSTEM.field("/proc/self/status", name);
        Some(Resident {
            bytes: status("VmRSS:")?,
            most_bytes: status("VmHWM:")?,
            own_bytes: status("RssAnon:")?,
        })
    }
}

#[cfg(target_os = "macos")]
mod platform {
    use super::{Free, Limit, Resident};
    use std::ffi::CStr;
    use std::mem::MaybeUninit;

    /// Pages that are free, and those that are given up when somebody wants them: of files, and what programs said may go.
    pub fn available_bytes() -> Option<u64> {
        let pages =
            [c"vm.page_free_count", c"vm.page_purgeable_count", c"vm.page_pageable_external_count"];
        let pages: u64 = pages.into_iter().map(sysctl).sum::<Option<u64>>()?;
        Some(pages * sysctl(c"hw.pagesize")?)
    }

    /// What others hold is compressed and swapped as it is needed, so all memory but this process's.
    pub fn free() -> Option<Free> {
        let own = resident()?.own_bytes;
        Some(Free { bytes: physical_bytes()?.saturating_sub(own), limit: Limit::Machine })
    }

    pub fn physical_bytes() -> Option<u64> {
        sysctl(c"hw.memsize")
    }

    pub fn resident() -> Option<Resident> {
        let mut now = MaybeUninit::<libc::rusage_info_v4>::zeroed();
        // SAFETY: the flavour is that of the structure, which is all numbers.
        let done = unsafe {
            libc::proc_pid_rusage(libc::getpid(), libc::RUSAGE_INFO_V4, now.as_mut_ptr().cast())
        };
        let mut ever = MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the structure is what the call fills.
        let also = unsafe { libc::getrusage(libc::RUSAGE_SELF, ever.as_mut_ptr()) };
        if done != 0 || also != 0 {
            return None;
        }
        // SAFETY: both were filled, and any bits are valid.
        let (now, ever) = unsafe { (now.assume_init(), ever.assume_init()) };
        Some(Resident {
            bytes: now.ri_resident_size,
            // Bytes on this system, kibibytes on others.
            most_bytes: ever.ru_maxrss as u64,
            own_bytes: now.ri_phys_footprint,
        })
    }

    /// A number of 4 or 8 bytes, low byte first as on every Mac.
    fn sysctl(name: &CStr) -> Option<u64> {
        let mut value = [0u8; 8];
        let mut len = value.len();
        // SAFETY: the name ends with a zero, and at most `len` bytes are written to as many.
        let done = unsafe {
            libc::sysctlbyname(
                name.as_ptr(),
                value.as_mut_ptr().cast(),
                &mut len,
                std::ptr::null_mut(),
                0,
            )
        };
        (done == 0 && [4, 8].contains(&len)).then(|| u64::from_le_bytes(value))
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod platform {
    use super::{Free, Resident};

    pub fn available_bytes() -> Option<u64> {
        None
    }

    pub fn free() -> Option<Free> {
        None
    }

    pub fn physical_bytes() -> Option<u64> {
        None
    }

    pub fn resident() -> Option<Resident> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(any(target_os = "linux", target_os = "macos"))]
    #[test]
    fn the_system_says() {
        let (all, free) = (physical_bytes().unwrap(), available_bytes().unwrap());
        assert!(0 < free && free <= all, "{free} of {all}");
        assert!(super::free().unwrap().bytes > 0);
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        let now = resident().unwrap();
        assert!(now.own_bytes >= 60 << 20 && now.bytes >= 60 << 20, "{now:?}");
        assert!(now.most_bytes >= 60 << 20, "{now:?}");
        drop(held);
    }
}
