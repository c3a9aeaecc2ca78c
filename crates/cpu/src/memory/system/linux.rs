//! Linux: `/proc/meminfo`, the control groups above this process (version 2 and 1), and its limits.
//!
//! A group leaves its limit less what it holds, but pages of files are given up when somebody wants memory. The same goes for
//! every group above it, and the tightest counts.

use super::{Free, Limit};

/// The files of a system.
pub(super) struct System<'a> {
    /// Content of the file at a path.
    pub(super) read: &'a dyn Fn(&str) -> Option<String>,
}

/// What a control group leaves, `u64::MAX` where it sets no limit.
struct Group {
    memory: u64,
    /// Memory and swap space together, given the swap space of the machine.
    all: u64,
}

impl System<'_> {
    /// See [`available_bytes`](super::available_bytes).
    pub(super) fn available_bytes(&self) -> Option<u64> {
        let machine = self.field("/proc/meminfo", "MemAvailable:")?;
        Some(self.groups(0).iter().fold(machine, |least, group| least.min(group.memory)))
    }

    /// See [`free`](super::free).
    pub(super) fn free(&self) -> Option<Free> {
        let swap = self.field("/proc/meminfo", "SwapFree:").unwrap_or(0);
        let machine = self.field("/proc/meminfo", "MemAvailable:")?.saturating_add(swap);
        let group = self.groups(swap).iter().map(|group| group.all).min();
        let left = |limit: &str, taken: &str| {
            let taken = self.field("/proc/self/status", taken)?;
            Some(self.limit(limit)?.saturating_sub(taken))
        };
        let all = [
            (Some(machine), Limit::Machine),
            (group, Limit::Group),
            (left("Max address space", "VmSize:"), Limit::Addresses),
            (left("Max data size", "VmData:"), Limit::Data),
        ];
        let known =
            all.into_iter().filter_map(|(bytes, limit)| Some(Free { bytes: bytes?, limit }));
        known.min_by_key(|free| free.bytes)
    }

    /// Bytes of a line of kibibytes.
    pub(super) fn field(&self, file: &str, name: &str) -> Option<u64> {
        let text = (self.read)(file)?;
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kibibytes: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kibibytes * 1024)
    }

    /// The soft limit of this name, if there is one.
    fn limit(&self, name: &str) -> Option<u64> {
        let text = (self.read)("/proc/self/limits")?;
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        rest.split_whitespace().next()?.parse().ok()
    }

    /// The groups that this process is in, where they count memory.
    fn groups(&self, swap: u64) -> Vec<Group> {
        let mut found = Vec::new();
        for line in (self.read)("/proc/self/cgroup").unwrap_or_default().lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let is_first = match controllers {
                "" => false,
                list if list.split(',').any(|c| c == "memory") => true,
                _ => continue,
            };
            // Inside a container the path may be the host's: then only its root is there.
            let mut path = path.trim_end_matches('/');
            loop {
                found.extend(match is_first {
                    true => self.first(&format!("/sys/fs/cgroup/memory{path}"), swap),
                    false => self.second(&format!("/sys/fs/cgroup{path}"), swap),
                });
                let Some((above, _)) = path.rsplit_once('/') else { break };
                path = above;
            }
        }
        found
    }

    /// A group of version 2.
    fn second(&self, folder: &str, swap: u64) -> Option<Group> {
        let number = |name: &str| self.number(&format!("{folder}/{name}"));
        let left = |most: &str, now: &str| {
            number(most).map_or(u64::MAX, |most| most.saturating_sub(number(now).unwrap_or(0)))
        };
        let held = number("memory.current")?;
        let pages = self.pages(folder, ["inactive_file ", "active_file "]);
        let memory = match number("memory.max") {
            Some(most) => most.saturating_sub(held.saturating_sub(pages)),
            None => u64::MAX,
        };
        let swap = swap.min(left("memory.swap.max", "memory.swap.current"));
        Some(Group { memory, all: memory.saturating_add(swap) })
    }

    /// A group of version 1.
    fn first(&self, folder: &str, swap: u64) -> Option<Group> {
        let pages = self.pages(folder, ["total_inactive_file ", "total_active_file "]);
        let left = |kind: &str| {
            let number = |name: &str| self.number(&format!("{folder}/memory.{kind}{name}"));
            let held = number("usage_in_bytes")?.saturating_sub(pages);
            Some(number("limit_in_bytes")?.saturating_sub(held))
        };
        let memory = left("")?;
        let all = memory.saturating_add(swap);
        Some(Group { memory, all: left("memsw.").map_or(all, |both| both.min(all)) })
    }

    /// Bytes of files in memory that a group gives up.
    fn pages(&self, folder: &str, names: [&str; 2]) -> u64 {
        let stat = (self.read)(&format!("{folder}/memory.stat")).unwrap_or_default();
        let bytes = |name: &str| -> Option<u64> {
            stat.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
        };
        names.into_iter().filter_map(bytes).sum()
    }

    /// The number that a file is; `None` also for `max`.
    fn number(&self, path: &str) -> Option<u64> {
        (self.read)(path)?.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "MemTotal:       16000 kB\nMemAvailable:   10000 kB\nSwapTotal: 4000 kB\nSwapFree:        3000 kB\n";
    const LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units     \n\
        Max data size             unlimited            unlimited            bytes     \n\
        Max address space         unlimited            unlimited            bytes     \n";
    const MIB: u64 = 1 << 20;

    /// What a system with these files says: available bytes, and free ones with their limit.
    fn says(files: &[(&str, &str)]) -> (Option<u64>, Option<Free>) {
        let read = |path: &str| {
            files.iter().find(|(p, _)| *p == path).map(|(_, content)| (*content).to_owned())
        };
        let system = System { read: &read };
        (system.available_bytes(), system.free())
    }

    fn free(bytes: u64, limit: Limit) -> Option<Free> {
        Some(Free { bytes, limit })
    }

    #[test]
    fn a_machine_without_groups_and_limits() {
        let files = [("/proc/meminfo", MEMINFO), ("/proc/self/limits", LIMITS)];
        assert_eq!(says(&files), (Some(10_000 << 10), free(13_000 << 10, Limit::Machine)));
        assert_eq!(says(&[]), (None, None));
    }

    #[test]
    fn a_group_of_version_2_leaves_its_limit_less_what_is_not_of_files() {
        let files = [
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "0::/user.slice/a.scope\n"),
            ("/sys/fs/cgroup/user.slice/a.scope/memory.max", "max\n"),
            ("/sys/fs/cgroup/user.slice/a.scope/memory.current", "3145728\n"),
            // The group above is the tighter one: 6 MiB, of which 4 are held, 1 by files.
            ("/sys/fs/cgroup/user.slice/memory.max", "6291456\n"),
            ("/sys/fs/cgroup/user.slice/memory.current", "4194304\n"),
            (
                "/sys/fs/cgroup/user.slice/memory.stat",
                "anon 99\nfile 900000000\ninactive_file 786432\nactive_file 262144\n",
            ),
            ("/sys/fs/cgroup/user.slice/memory.swap.max", "1048576\n"),
            ("/sys/fs/cgroup/user.slice/memory.swap.current", "524288\n"),
        ];
        let left = 3 * MIB;
        assert_eq!(says(&files), (Some(left), free(left + MIB / 2, Limit::Group)));
    }

    #[test]
    fn a_container_whose_path_is_the_host_s_has_its_group_at_the_root() {
        let files = [
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/cgroup", "12:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n"),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "5242880\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "4194304\n"),
            (
                "/sys/fs/cgroup/memory/memory.stat",
                "inactive_file 7\ntotal_inactive_file 1048576\ntotal_active_file 1048576\n",
            ),
            ("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes", "6291456\n"),
            ("/sys/fs/cgroup/memory/memory.memsw.usage_in_bytes", "4194304\n"),
        ];
        assert_eq!(says(&files), (Some(3 * MIB), free(4 * MIB, Limit::Group)));
        // Without a count of swap the machine's is free to take.
        assert_eq!(says(&files[..5]).1, free(3 * MIB + (3000 << 10), Limit::Group));
    }

    #[test]
    fn limits_of_the_process_leave_what_it_has_not_taken() {
        let status = "VmPeak:\t 9 kB\nVmSize:\t    2000 kB\nVmData:\t     500 kB\n";
        let limits =
            LIMITS.replace("address space         unlimited ", "address space         4194304   ");
        let mut files = vec![
            ("/proc/meminfo", MEMINFO),
            ("/proc/self/status", status),
            ("/proc/self/limits", &limits),
        ];
        let left = (4096 - 2000) << 10;
        assert_eq!(says(&files), (Some(10_000 << 10), free(left, Limit::Addresses)));
        let limits =
            limits.replace("data size             unlimited ", "data size             1048576   ");
        files[2].1 = &limits;
        assert_eq!(says(&files).1, free((1024 - 500) << 10, Limit::Data));
        // More than the limit is taken.
        files[1].1 = "VmSize: 9000 kB\nVmData: 10 kB\n";
        assert_eq!(says(&files).1, free(0, Limit::Addresses));
    }
}
