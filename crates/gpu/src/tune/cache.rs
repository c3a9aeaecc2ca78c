//! Choices on disk: a JSON file for each device, `{"key": Key, "choices": [Choice]}`.
//!
//! What was measured with another driver, other kernels or another version says nothing of these, so a file whose key is
//! another one is not read, and neither is one that is damaged; [`CacheError`] says which, in a line. A file is written whole and then gets its name, under a lock
//! that lies beside it, with what others wrote in between taken over.

use super::{Choice, Facts, Tuned, candidates, class};
use crate::GpuDevice;
use marlin_checkpoint::write_file;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Longest file that is read.
const MOST_BYTES: u64 = 16 << 20;

/// What choices hold for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// `"cuda"`, `"vulkan"` or `"metal"`.
    pub runtime: String,
    /// What the driver calls the device.
    pub device: String,
    /// The driver's version, in its own words; empty where it says none.
    pub driver: String,
    /// Hash of the kernels' sources.
    pub kernels: String,
    /// Version of this crate.
    pub version: String,
}

impl Key {
    /// The key of `device` in this build.
    pub fn of(device: &GpuDevice) -> Self {
        Self {
            runtime: device.runtime.name().to_owned(),
            device: device.name.clone(),
            driver: device.driver.clone().unwrap_or_default(),
            kernels: env!("MARLIN_KERNELS").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// The first field in which `found` differs, with both values.
    fn difference(&self, found: &Self) -> Option<(&'static str, String, String)> {
        let fields = [
            ("runtime", &self.runtime, &found.runtime),
            ("device", &self.device, &found.device),
            ("driver", &self.driver, &found.driver),
            ("version", &self.version, &found.version),
            ("kernels", &self.kernels, &found.kernels),
        ];
        let other = fields.into_iter().find(|(_, wanted, found)| wanted != found);
        other.map(|(field, wanted, found)| (field, wanted.clone(), found.clone()))
    }
}

/// Why choices on disk are not used, or not written.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// It is of another device, driver or build.
    #[error(
        "{}: tuned for {field} {found:?}, here it is {wanted:?}; run `marlin tune` again",
        path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Field of the key.
        field: &'static str,
        /// Here.
        wanted: String,
        /// In the file.
        found: String,
    },
    /// It is not what was written.
    #[error("{}: damaged: {reason}; run `marlin tune` again", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    key: Key,
    choices: Vec<Choice>,
}

/// The file in `folder` for `key`'s device.
pub fn file(folder: &Path, key: &Key) -> PathBuf {
    let name = format!("{}-{}", key.runtime, key.device);
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    let name: String = name.chars().take(100).map(plain).collect();
    folder.join(format!("{name}.json"))
}

/// Choices in the file for `key`; `None` when there is no file.
///
/// # Errors
/// When there is one that holds for something else, is damaged, or cannot be read.
pub fn read(folder: &Path, key: &Key) -> Result<Option<Tuned>, CacheError> {
    let path = file(folder, key);
    let corrupt = |reason: String| CacheError::Corrupt { path: path.clone(), reason };
    let opened = match File::open(&path) {
        Ok(opened) => opened,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(CacheError::Io { path, source }),
    };
    let mut bytes = Vec::new();
    let read = opened.take(MOST_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|source| CacheError::Io { path: path.clone(), source })?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(corrupt(format!("longer than {MOST_BYTES} bytes")));
    }
    let value: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|e| corrupt(e.to_string()))?;
    // A key first: another version may have other fields.
    let found: Key =
        serde_json::from_value(value["key"].clone()).map_err(|e| corrupt(format!("key: {e}")))?;
    if let Some((field, wanted, found)) = key.difference(&found) {
        return Err(CacheError::Foreign { path, field, wanted, found });
    }
    let contents: Contents = serde_json::from_value(value).map_err(|e| corrupt(e.to_string()))?;
    let mut tuned = Tuned::default();
    for choice in contents.choices {
        if !sound(&choice) {
            let (shape, variant) = (&choice.shape, choice.variant);
            return Err(corrupt(format!("no kernel for {shape} has the variant \"{variant}\"")));
        }
        tuned.insert(choice);
    }
    Ok(Some(tuned))
}

/// Whether some device can have chosen so.
fn sound(choice: &Choice) -> bool {
    if choice.rows.is_some_and(|rows| class(rows) != rows) {
        return false;
    }
    let mut all = Facts::ANY.iter().flat_map(|f| candidates(&choice.shape, choice.rows, f));
    all.any(|variant| variant == choice.variant)
}

/// Adds `tuned` to the file for `key`, and gives what it holds then. A file that holds for something else, or is damaged, is replaced.
///
/// # Errors
/// When the folder cannot be made, or the file not written; it is as it was then.
pub fn write(folder: &Path, key: &Key, tuned: &Tuned) -> Result<Tuned, CacheError> {
    let path = file(folder, key);
    let at = |source| CacheError::Io { path: path.clone(), source };
    fs::create_dir_all(folder).map_err(at)?;
    let lock = File::create(path.with_extension("lock")).map_err(at)?;
    // Freed when it is closed, also by a process that dies.
    lock.lock().map_err(at)?;
    let mut all = read(folder, key).ok().flatten().unwrap_or_default();
    all.merge(tuned);
    let contents = Contents { key: key.clone(), choices: all.iter().cloned().collect() };
    let json = serde_json::to_vec_pretty(&contents).map_err(|e| at(e.into()))?;
    write_file(&path, &json).map_err(|e| at(io::Error::other(e)))?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::choice;
    use super::*;
    use crate::Runtime;
    use crate::tune::Variant;

    const VARIANT: Variant = Variant::Decode { planes: 2, tile: 1 };

    fn device() -> GpuDevice {
        GpuDevice {
            runtime: Runtime::Vulkan,
            index: 0,
            name: "Some GPU (model 3/x)".to_owned(),
            memory_bytes: None,
            is_software: false,
            driver: Some("1.2.3".to_owned()),
        }
    }

    fn some(count: usize) -> Tuned {
        let mut tuned = Tuned::default();
        (0..count).for_each(|i| tuned.insert(choice(8 * i + 8, 1, VARIANT)));
        tuned
    }

    #[test]
    fn the_key_holds_device_driver_kernels_and_version() {
        let key = Key::of(&device());
        assert_eq!(
            (&*key.runtime, &*key.device, &*key.driver),
            ("vulkan", "Some GPU (model 3/x)", "1.2.3")
        );
        assert_eq!(key.version, env!("CARGO_PKG_VERSION"));
        assert!(key.kernels.len() == 16 && u64::from_str_radix(&key.kernels, 16).is_ok());
        let name = file(Path::new(""), &key);
        assert_eq!(name, Path::new("vulkan-Some_GPU__model_3_x_.json"));
    }

    #[test]
    fn what_was_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let key = Key::of(&device());
        assert!(read(folder.path(), &key).unwrap().is_none());
        let mut tuned = some(3);
        tuned.insert(Choice {
            shape: crate::tune::Shape::Attention {
                num_heads: 4,
                num_kv_heads: 2,
                key_head_dim: 64,
                value_head_dim: 64,
                cache_type: "f16".to_owned(),
                latent: false,
                windowed: true,
            },
            rows: None,
            variant: Variant::Parts { keys: 256, planes: 8 },
            rule: Variant::Parts { keys: 128, planes: 4 },
            rule_us: 2.5,
            best_us: 2.0,
        });
        // In a folder that is not there yet.
        let below = folder.path().join("a/b");
        assert_eq!(write(&below, &key, &tuned).unwrap(), tuned);
        assert_eq!(read(&below, &key).unwrap(), Some(tuned));
    }

    #[test]
    fn another_key_is_told_with_both_values() {
        let folder = tempfile::tempdir().unwrap();
        let key = Key::of(&device());
        write(folder.path(), &key, &some(1)).unwrap();
        let others = [
            ("driver", Key { driver: "1.2.4".to_owned(), ..key.clone() }),
            ("kernels", Key { kernels: "0".repeat(16), ..key.clone() }),
            ("version", Key { version: "9.0.0".to_owned(), ..key.clone() }),
        ];
        for (field, other) in others {
            let error = read(folder.path(), &other).unwrap_err().to_string();
            assert!(error.contains(&format!("tuned for {field}")), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        // Names that differ in what a file name cannot hold share one.
        let other = Key { device: "Some GPU (model 3 x)".to_owned(), ..key.clone() };
        assert!(matches!(
            read(folder.path(), &other),
            Err(CacheError::Foreign { field: "device", .. })
        ));
        // Tuning again replaces it.
        assert_eq!(write(folder.path(), &other, &some(2)).unwrap(), some(2));
        assert_eq!(read(folder.path(), &other).unwrap(), Some(some(2)));
    }

    #[test]
    fn damage_is_told_in_a_line_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let key = Key::of(&device());
        write(folder.path(), &key, &some(2)).unwrap();
        let path = file(folder.path(), &key);
        let whole = fs::read_to_string(&path).unwrap();
        let mut damaged: Vec<String> =
            (0..whole.len()).step_by(7).map(|end| whole[..end].to_owned()).collect();
        damaged.extend([
            "[]".to_owned(),
            "{\"key\": 3}".to_owned(),
            "\0\u{1}nonsense".to_owned(),
            whole.replace("\"planes\": 2", "\"planes\": 4000000000"),
            whole.replace("\"planes\": 2", "\"planes\": -2"),
            whole.replace("\"rows\": 1", "\"rows\": 3"),
            whole.replace("\"rows\": 1", "\"rows\": 1e99"),
            whole.replace("\"choices\"", "\"chances\""),
            whole.replace("\"rule_us\"", "\"other\": 1, \"rule_us\""),
        ]);
        for text in damaged {
            fs::write(&path, &text).unwrap();
            let error = read(folder.path(), &key).unwrap_err();
            let CacheError::Corrupt { .. } = &error else { panic!("{error} for {text}") };
            assert_eq!(error.to_string().lines().count(), 1, "{error}");
        }
        write(folder.path(), &key, &some(1)).unwrap();
        assert_eq!(read(folder.path(), &key).unwrap(), Some(some(1)));
    }

    #[test]
    fn writers_at_once_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let key = Key::of(&device());
        let count = 8;
        std::thread::scope(|s| {
            for writer in 0..count {
                let (folder, key) = (folder.path(), &key);
                s.spawn(move || {
                    for i in 0..count {
                        let mut tuned = Tuned::default();
                        tuned.insert(choice(8 * (writer * count + i) + 8, 1, VARIANT));
                        write(folder, key, &tuned).unwrap();
                        // Never half a file.
                        assert!(read(folder, key).unwrap().is_some());
                    }
                });
            }
        });
        assert_eq!(read(folder.path(), &key).unwrap(), Some(some(count * count)));
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left.len(), 2, "the file and its lock: {left:?}");
    }
}
