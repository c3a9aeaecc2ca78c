//! The byte-level alphabet: a bijection between the 256 bytes and 256 printable characters.
//!
//! Byte-level vocabularies are stored as text. Bytes that are printable in Latin-1 stand for
//! themselves; the others are numbered upwards from U+0100 in byte order, so that a space is `Ġ`
//! and a newline `Ċ`. Source: the GPT-2 encoder, which every later byte-level BPE keeps.

/// One past the largest code point of the alphabet: 256 plus the 68 unprintable bytes.
const END: usize = 0x100 + 68;

const fn printable(byte: u8) -> bool {
    matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff)
}

/// Code point to byte; `None` where the alphabet has no such character.
static BYTE_OF: [Option<u8>; END] = {
    let mut table = [None; END];
    let mut next = 0x100;
    let mut byte = 0usize;
    while byte < 256 {
        if printable(byte as u8) {
            table[byte] = Some(byte as u8);
        } else {
            table[next] = Some(byte as u8);
            next += 1;
        }
        byte += 1;
    }
    table
};

/// The bytes that `text` stands for; `None` when a character is not of the alphabet.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    text.chars().map(|c| BYTE_OF.get(c as usize).copied().flatten()).collect()
}

/// The character that stands for `byte`.
pub(crate) fn character(byte: u8) -> char {
    let found = (0u32..).zip(&BYTE_OF).find(|&(_, of)| *of == Some(byte));
    let (code, _) = found.expect("the alphabet has all bytes, see the test");
    char::from_u32(code).expect("the alphabet lies below U+0144")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_is_a_bijection() {
        let mut bytes: Vec<u8> = BYTE_OF.iter().flatten().copied().collect();
        assert_eq!(bytes.len(), 256);
        bytes.sort_unstable();
        bytes.dedup();
        assert_eq!(bytes.len(), 256);
        for byte in bytes {
            assert_eq!(decode(&character(byte).to_string()), Some(vec![byte]));
        }
    }

    #[test]
    fn known_characters() {
        assert_eq!(decode("Ġa"), Some(b" a".to_vec()));
        assert_eq!(decode("Ċ"), Some(b"\n".to_vec()));
        assert_eq!(decode("Ã©"), Some("é".as_bytes().to_vec()));
        assert_eq!(decode("｜"), None);
    }
}
