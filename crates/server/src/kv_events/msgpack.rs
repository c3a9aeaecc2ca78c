//! MessagePack, as much of it as events need. Numbers and lengths take as few bytes as they can.

/// A value as it is written. Lengths are the caller's word: an array of two is followed by two values.
#[derive(Debug, Default)]
pub(super) struct Writer {
    pub bytes: Vec<u8>,
}

impl Writer {
    pub fn nothing(&mut self) {
        self.bytes.push(0xC0);
    }

    pub fn float(&mut self, value: f64) {
        self.bytes.push(0xCB);
        self.bytes.extend(value.to_be_bytes());
    }

    pub fn number(&mut self, value: u64) {
        match value {
            ..0x80 => self.bytes.push(value as u8),
            0x80..=0xFF => self.bytes.extend([0xCC, value as u8]),
            0x100..=0xFFFF => self.tagged(0xCD, &(value as u16).to_be_bytes()),
            0x1_0000..=0xFFFF_FFFF => self.tagged(0xCE, &(value as u32).to_be_bytes()),
            _ => self.tagged(0xCF, &value.to_be_bytes()),
        }
    }

    pub fn numbers(&mut self, values: impl ExactSizeIterator<Item = u64>) {
        self.array(values.len());
        values.for_each(|value| self.number(value));
    }

    pub fn text(&mut self, text: &str) {
        match text.len() {
            length @ ..32 => self.bytes.push(0xA0 | length as u8),
            length @ 32..=0xFF => self.bytes.extend([0xD9, length as u8]),
            length @ 0x100..=0xFFFF => self.tagged(0xDA, &(length as u16).to_be_bytes()),
            length => self.tagged(0xDB, &(length as u32).to_be_bytes()),
        }
        self.bytes.extend(text.as_bytes());
    }

    pub fn array(&mut self, length: usize) {
        match length {
            ..16 => self.bytes.push(0x90 | length as u8),
            16..=0xFFFF => self.tagged(0xDC, &(length as u16).to_be_bytes()),
            _ => self.tagged(0xDD, &(length as u32).to_be_bytes()),
        }
    }

    /// A map of fewer than 16 keys.
    pub fn map(&mut self, length: u8) {
        debug_assert!(length < 16, "larger maps have another form");
        self.bytes.push(0x80 | length);
    }

    fn tagged(&mut self, tag: u8, bytes: &[u8]) {
        self.bytes.push(tag);
        self.bytes.extend(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `msgpack` 1.2.4 for Python packs them.
    #[test]
    fn values_have_their_shortest_form() {
        let numbers: [(u64, &[u8]); 10] = [
            (0, &[0]),
            (0x7F, &[0x7F]),
            (0x80, &[0xCC, 0x80]),
            (0xFF, &[0xCC, 0xFF]),
            (0x100, &[0xCD, 1, 0]),
            (0xFFFF, &[0xCD, 0xFF, 0xFF]),
            (0x1_0000, &[0xCE, 0, 1, 0, 0]),
            (0xFFFF_FFFF, &[0xCE, 0xFF, 0xFF, 0xFF, 0xFF]),
            (0x1_0000_0000, &[0xCF, 0, 0, 0, 1, 0, 0, 0, 0]),
            (u64::MAX, &[0xCF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF]),
        ];
        for (value, expected) in numbers {
            let mut writer = Writer::default();
            writer.number(value);
            assert_eq!(writer.bytes, expected, "{value:#x}");
        }
        let texts: [(usize, &[u8]); 6] = [
            (0, &[0xA0]),
            (31, &[0xBF]),
            (32, &[0xD9, 32]),
            (255, &[0xD9, 0xFF]),
            (256, &[0xDA, 1, 0]),
            (65_536, &[0xDB, 0, 1, 0, 0]),
        ];
        for (length, expected) in texts {
            let mut writer = Writer::default();
            writer.text(&"a".repeat(length));
            assert_eq!(writer.bytes[..expected.len()], *expected, "{length}");
            assert_eq!(writer.bytes.len(), expected.len() + length);
        }
        let arrays: [(usize, &[u8]); 5] = [
            (0, &[0x90]),
            (15, &[0x9F]),
            (16, &[0xDC, 0, 16]),
            (65_535, &[0xDC, 0xFF, 0xFF]),
            (65_536, &[0xDD, 0, 1, 0, 0]),
        ];
        for (length, expected) in arrays {
            let mut writer = Writer::default();
            writer.array(length);
            assert_eq!(writer.bytes, expected, "{length}");
        }
        let mut writer = Writer::default();
        writer.map(2);
        writer.nothing();
        writer.float(1.5);
        assert_eq!(writer.bytes, [0x82, 0xC0, 0xCB, 0x3F, 0xF8, 0, 0, 0, 0, 0, 0]);
    }
}
