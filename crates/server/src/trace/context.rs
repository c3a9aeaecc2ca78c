//! Who called: W3C Trace Context (Recommendation, November 2021), the headers `traceparent` and `tracestate`.

use axum::http::HeaderMap;

/// Bytes of `tracestate` that are handed on; that many everybody has to.
const STATE: usize = 512;

/// A place in a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace; never 0.
    pub trace: u128,
    /// The caller's span, if there is one.
    pub parent: Option<u64>,
    /// Whether the caller keeps its spans.
    pub sampled: bool,
    /// What others have noted.
    pub state: String,
}

impl TraceContext {
    /// What the headers of a request say; nothing where they say nothing that can be read.
    pub fn read(headers: &HeaderMap) -> Option<Self> {
        let mut parents = headers.get_all("traceparent").iter();
        let (Some(parent), None) = (parents.next(), parents.next()) else { return None };
        let mut context = Self::parse(parent.to_str().ok()?)?;
        let states = headers.get_all("tracestate").iter().filter_map(|state| state.to_str().ok());
        let state = states.collect::<Vec<_>>().join(",");
        if state.len() <= STATE {
            context.state = state;
        }
        Some(context)
    }

    /// A trace of its own.
    pub fn root() -> Self {
        let trace = rand::random::<u128>().max(1);
        Self { trace, parent: None, sampled: true, state: String::new() }
    }

    /// `version-trace-parent-flags`, in lower-case hexadecimal digits. A later version may have more behind it.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let mut part = |digits: usize| {
            let part = parts.next()?;
            let plain = part.len() == digits
                && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            plain.then(|| u128::from_str_radix(part, 16).ok())?
        };
        let (version, trace, parent, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        let more = parts.next().is_some();
        if version == 0xFF || version == 0 && more || trace == 0 || parent == 0 {
            return None;
        }
        let parent = u64::try_from(parent).ok();
        Some(Self { trace, parent, sampled: flags & 1 == 1, state: String::new() })
    }

    /// The trace, as logs and collectors write it.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn callers_are_known_by_their_headers() {
        let context = TraceContext::parse(GOOD).unwrap();
        assert_eq!(context.trace_id(), "0af7651916cd43dd8448eb211c80319c");
        assert_eq!((context.parent, context.sampled), (Some(0xb7ad_6b71_6920_3331), true));
        let unsampled = TraceContext::parse(&GOOD.replace("-01", "-fe")).unwrap();
        assert!(!unsampled.sampled);
        // A version that is to come.
        assert!(
            TraceContext::parse(&format!("{}-what-ever", GOOD.replacen("00", "cc", 1))).is_some()
        );
        let bad = [
            "".to_owned(),
            "00".to_owned(),
            GOOD.replacen("00", "ff", 1),
            format!("{GOOD}-more"),
            format!("{GOOD} "),
            GOOD.to_uppercase(),
            GOOD.replace("-01", ""),
            GOOD.replace("-01", "-1"),
            GOOD.replace("-01", "-+1"),
            GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            GOOD.replace("b7ad6b7169203331", &"0".repeat(16)),
            GOOD.replace("b7ad6b7169203331", "b7ad6b716920333é"),
        ];
        for text in bad {
            assert_eq!(TraceContext::parse(&text), None, "{text:?}");
        }
    }

    #[test]
    fn what_others_have_noted_is_handed_on() {
        let mut headers = HeaderMap::new();
        assert_eq!(TraceContext::read(&headers), None);
        headers.append("tracestate", HeaderValue::from_static("a=1,b=2"));
        headers.append("tracestate", HeaderValue::from_static("c=3"));
        assert_eq!(TraceContext::read(&headers), None);
        headers.append("traceparent", HeaderValue::from_static(GOOD));
        assert_eq!(TraceContext::read(&headers).unwrap().state, "a=1,b=2,c=3");
        headers.append("tracestate", HeaderValue::from_str(&"x".repeat(600)).unwrap());
        assert_eq!(TraceContext::read(&headers).unwrap().state, "");
        headers.append("traceparent", HeaderValue::from_static(GOOD));
        assert_eq!(TraceContext::read(&headers), None, "two callers");
        assert_ne!(TraceContext::root().trace, TraceContext::root().trace);
    }
}
