//! Patterns in which `*` stands for any text and `?` for one byte.

/// Whether all of `text` matches `pattern`.
pub fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Where to continue when what follows the last star does not fit.
    let mut retry = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((after, from)) = retry else { return false };
                retry = Some((after, from + 1));
                (p, t) = (after, from + 1);
            }
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("lm_head", "lm_head", true),
            ("lm_head", "lm_head2", false),
            ("*.down_proj", "model.layers.0.mlp.down_proj", true),
            ("model.layers.1.*", "model.layers.1.mlp.up_proj", true),
            ("model.layers.1.*", "model.layers.11.mlp.up_proj", false),
            ("*experts*", "model.layers.1.mlp.experts", true),
            ("*a*b", "xaxbxb", true),
            ("*a*b", "xaxbx", false),
        ] {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }
}
