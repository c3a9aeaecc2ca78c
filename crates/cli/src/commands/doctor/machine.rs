//! What there is on a machine beside what this build uses. Looked up below a root, so that tests can have one of their own.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Makers of GPUs, by what PCI calls them.
const VENDORS: [(&str, &str); 3] = [("0x10de", "NVIDIA"), ("0x1002", "AMD"), ("0x8086", "Intel")];

/// A card that the system knows of, whether this build can use it or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Who made it.
    pub vendor: &'static str,
    /// The model, where the driver says, and where it was seen.
    pub name: String,
}

/// A machine's file system.
pub struct Machine<'a> {
    /// Its root.
    pub root: &'a Path,
    /// Its environment.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
}

impl Machine<'_> {
    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn text(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.at(path)).ok()
    }

    /// Names in a folder, in order.
    fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.at(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// Cards that Linux lists: NVIDIA's by its driver, others by what drives their displays.
    pub fn cards(&self) -> Vec<Card> {
        let nvidia = "/proc/driver/nvidia/gpus";
        let model = |card: &String| -> Option<Card> {
            let file = format!("{nvidia}/{card}/information");
            let text = self.text(&file)?;
            let name = text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim();
            Some(Card { vendor: "NVIDIA", name: format!("{name} (/proc/driver/nvidia)") })
        };
        let mut cards: Vec<Card> = self.names(nvidia).iter().filter_map(model).collect();
        if cards.is_empty() && self.at("/dev/nvidia0").exists() {
            cards.push(Card { vendor: "NVIDIA", name: "NVIDIA's card (/dev/nvidia0)".to_owned() });
        }
        let drm = "/sys/class/drm";
        let mut seen: BTreeMap<&str, String> = BTreeMap::new();
        // Outputs of a card are entries, too: card0-DP-1.
        for card in self.names(drm).iter().filter(|n| n.starts_with("card") && !n.contains('-')) {
            let file = format!("{drm}/{card}/device/vendor");
            let Some(id) = self.text(&file) else { continue };
            let known = VENDORS.iter().find(|(vendor, _)| *vendor == id.trim());
            if let Some((_, vendor)) = known {
                seen.entry(vendor)
                    .or_insert_with(|| format!("a card of {vendor}'s ({drm}/{card})"));
            }
        }
        let others = seen.into_iter().filter(|(vendor, _)| {
            // The driver has said more of these.
            *vendor != "NVIDIA" || !cards.iter().any(|card| card.vendor == "NVIDIA")
        });
        let others: Vec<Card> = others.map(|(vendor, name)| Card { vendor, name }).collect();
        cards.extend(others);
        cards
    }

    /// Where the loader finds NVRTC, which compiles kernels for NVIDIA's GPUs when they are first launched.
    pub fn nvrtc(&self) -> Option<PathBuf> {
        const NAME: &str = "libnvrtc.so";
        let listed = (self.variable)("LD_LIBRARY_PATH").unwrap_or_default();
        let listed = listed.split(':').filter(|folder| !folder.is_empty()).map(str::to_owned);
        let usual = ["/lib64", "/usr/lib64", "/lib", "/usr/lib"].map(str::to_owned);
        let in_folder = |folder: String| {
            let name = self.names(&folder).into_iter().find(|name| name.starts_with(NAME))?;
            Some(PathBuf::from(folder).join(name))
        };
        listed.chain(usual).find_map(in_folder).or_else(|| {
            // The loader's own list holds paths that end with a zero.
            let cache = std::fs::read(self.at("/etc/ld.so.cache")).ok()?;
            let paths = cache.split(|byte| *byte == 0).filter(|text| text.starts_with(b"/"));
            let mut paths = paths.filter_map(|text| std::str::from_utf8(text).ok());
            let path = paths.find(|path| {
                let name = Path::new(path).file_name().and_then(OsStr::to_str);
                name.is_some_and(|name| name.starts_with(NAME))
            })?;
            self.at(path).exists().then(|| PathBuf::from(path))
        })
    }

    /// CUDA's headers, which the kernels include, where the runtime looks for them.
    pub fn cuda_headers(&self) -> Option<PathBuf> {
        let usual = ["/usr/local/cuda", "/opt/cuda", "/usr"].map(str::to_owned);
        let named = (self.variable)("CUDA_PATH");
        // A path that is named is the only one.
        let roots = named.map_or_else(|| usual.to_vec(), |root| vec![root]);
        let mut headers = roots.into_iter().map(|root| format!("{root}/include/cuda_fp16.h"));
        headers.find(|header| self.at(header).exists()).map(PathBuf::from)
    }

    /// How the system gives out huge pages, without which large matrices cost more address translations.
    pub fn huge_pages(&self) -> Option<String> {
        let text = self.text("/sys/kernel/mm/transparent_hugepage/enabled")?;
        // `always [madvise] never`
        let (_, rest) = text.split_once('[')?;
        rest.split_once(']').map(|(chosen, _)| chosen.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, file: &str, content: &[u8]) {
        let path = root.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    #[test]
    fn an_empty_machine_has_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let machine = Machine { root: folder.path(), variable: &|_| None };
        assert_eq!(machine.cards(), []);
        assert_eq!(
            (machine.nvrtc(), machine.cuda_headers(), machine.huge_pages()),
            (None, None, None)
        );
    }

    #[test]
    fn cards_are_seen_without_their_runtimes() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let machine = Machine { root, variable: &|_| None };
        let names = || -> Vec<String> { machine.cards().into_iter().map(|c| c.name).collect() };
        write(root, "sys/class/drm/card0/device/vendor", b"0x10de\n");
        assert_eq!(names(), ["a card of NVIDIA's (/sys/class/drm/card0)"]);
        write(root, "dev/nvidia0", b"");
        write(root, "sys/class/drm/card1/device/vendor", b"0x1002\n");
        write(root, "sys/class/drm/card1-DP-1/device/vendor", b"0x1002\n");
        // A display without a GPU of a kind we know.
        write(root, "sys/class/drm/card2/device/vendor", b"0x1a03\n");
        assert_eq!(
            names(),
            ["NVIDIA's card (/dev/nvidia0)", "a card of AMD's (/sys/class/drm/card1)"]
        );
        let said = b"Model: \t\t NVIDIA H200\nIRQ:   \t\t 42\n";
        write(root, "proc/driver/nvidia/gpus/0000:19:00.0/information", said);
        assert_eq!(names()[0], "NVIDIA H200 (/proc/driver/nvidia)");
    }

    #[test]
    fn what_cuda_needs_is_looked_for_where_it_is_loaded_from() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let plain = Machine { root, variable: &|_| None };
        let cache =
            b"glibc-ld.so.cache1.1\0libnvrtc.so.13\0/opt/nvrtc/libnvrtc.so.13\0/lib/libm.so.6\0";
        write(root, "etc/ld.so.cache", cache);
        // A list may be older than what it lists.
        assert_eq!(plain.nvrtc(), None);
        write(root, "opt/nvrtc/libnvrtc.so.13", b"");
        assert_eq!(plain.nvrtc(), Some(PathBuf::from("/opt/nvrtc/libnvrtc.so.13")));
        write(root, "mine/libnvrtc.so.12", b"");
        write(root, "mine/include/cuda_fp16.h", b"");
        let set = |name: &str| match name {
            "LD_LIBRARY_PATH" => Some("/nothing::/mine".to_owned()),
            "CUDA_PATH" => Some("/mine".to_owned()),
            _ => None,
        };
        let named = Machine { root, variable: &set };
        assert_eq!(named.nvrtc(), Some(PathBuf::from("/mine/libnvrtc.so.12")));
        assert_eq!(named.cuda_headers(), Some(PathBuf::from("/mine/include/cuda_fp16.h")));
        assert_eq!(plain.cuda_headers(), None);
        write(root, "usr/local/cuda/include/cuda_fp16.h", b"");
        assert!(plain.cuda_headers().is_some());
        write(root, "sys/kernel/mm/transparent_hugepage/enabled", b"always [madvise] never\n");
        assert_eq!(plain.huge_pages().as_deref(), Some("madvise"));
    }
}
