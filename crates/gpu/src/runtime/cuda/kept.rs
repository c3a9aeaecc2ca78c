//! Machine code that is kept on disk, so that a kernel is compiled once on a machine. A file's name says of what text and for what
//! compiler and device it is, and its first words say so again, and whether it is whole; one that is not is made anew.

use crate::ops::text::{FNV1A, fnv1a};
use crate::runtime::CUDA_KERNELS;
use marlin_checkpoint::write_file;
use std::fs;
use std::path::PathBuf;

/// Where the hash of a name begins, and where it begins for a second opinion.
const BASES: [u64; 2] = [FNV1A, 0x6c62_272e_07bb_0142];

/// What a text is compiled with, and the text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    name: u64,
    again: u64,
}

impl Key {
    pub(super) fn of(compiler: &str, source: &str) -> Self {
        let of =
            |base| [compiler.as_bytes(), &[0], source.as_bytes()].into_iter().fold(base, fnv1a);
        let [name, again] = BASES.map(of);
        Self { name, again }
    }

    fn path(self) -> Option<PathBuf> {
        Some(CUDA_KERNELS.get()?.kept_in.as_ref()?.join(format!("{:016x}.bin", self.name)))
    }

    fn header(self, code: &[u8]) -> [u8; 16] {
        let words = [self.again, fnv1a(FNV1A, code)].map(u64::to_le_bytes);
        std::array::from_fn(|i| words[i / 8][i % 8])
    }

    /// What was kept.
    pub(super) fn find(self) -> Option<Vec<u8>> {
        let mut file = fs::read(self.path()?).ok()?;
        let header: [u8; 16] = file.get(..16)?.try_into().ok()?;
        (self.header(&file[16..]) == header).then(|| file.split_off(16))
    }

    /// Keeps `code`. A disk that is full or not to be written to costs the next program a compilation, and nothing else.
    pub(super) fn keep(self, code: &[u8]) {
        let Some(path) = self.path() else { return };
        let made = path.parent().is_some_and(|folder| fs::create_dir_all(folder).is_ok());
        if made {
            let _ = write_file(&path, &[&self.header(code), code].concat());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_found_again_unless_it_is_damaged_or_of_another_text() {
        let folder = tempfile::tempdir().unwrap();
        let kept_in = Some(folder.path().join("deeper"));
        crate::compile_cuda(crate::CudaKernels { kept_in, toolkit: None });
        let key = Key::of("sm_90a", "a text");
        assert!(key.find().is_none());
        key.keep(b"machine code");
        assert_eq!(key.find().unwrap(), b"machine code");
        for other in
            [Key::of("sm_90a", "a texT"), Key::of("sm_90", "aa text"), Key { again: 0, ..key }]
        {
            assert!(other.find().is_none());
        }
        let path = key.path().unwrap();
        let whole = fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() - 1], &whole[..10], &[]] {
            fs::write(&path, damaged).unwrap();
            assert!(key.find().is_none());
        }
        key.keep(b"other code");
        assert_eq!(key.find().unwrap(), b"other code");
    }
}
