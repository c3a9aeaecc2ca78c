//! Who may ask, and how much.

use crate::ApiError;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use subtle::ConstantTimeEq;

/// Shortest key that is taken.
const MIN_KEY: usize = 8;

/// A key and what it is called in logs and metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Name.
    pub name: String,
    /// Secret.
    pub secret: String,
}

impl Key {
    /// A key called `name`.
    ///
    /// # Errors
    /// When it is too short to be one.
    pub fn new(name: String, secret: &str) -> Result<Self, String> {
        match secret.trim() == secret && secret.len() >= MIN_KEY {
            true => Ok(Self { name, secret: secret.to_owned() }),
            false => {
                Err(format!("a key has at least {MIN_KEY} characters, and no space around them"))
            }
        }
    }

    /// The keys of a file: one in a line, as `NAME:KEY` or `KEY`; lines that begin with `#` are not read.
    ///
    /// # Errors
    /// Names the line at fault.
    pub fn parse_all(text: &str) -> Result<Vec<Self>, String> {
        let lines = text.lines().map(str::trim).enumerate();
        let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let key = |(number, line): (usize, &str)| {
            let (name, secret) = match line.split_once(':') {
                Some((name, secret)) => (name.trim().to_owned(), secret.trim()),
                None => (format!("key-{}", number + 1), line),
            };
            if secret.len() < MIN_KEY {
                return Err(format!(
                    "line {}: a key has at least {MIN_KEY} characters",
                    number + 1
                ));
            }
            Ok(Self { name, secret: secret.to_owned() })
        };
        lines.map(key).collect()
    }
}

/// How much one key may ask for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quota {
    /// Requests in a minute.
    pub per_minute: Option<u32>,
    /// Requests under way.
    pub concurrent: Option<usize>,
}

/// What is known of a caller.
#[derive(Debug)]
struct Caller {
    /// Requests it may send now.
    tokens: f64,
    updated: Instant,
    running: usize,
}

/// The keys of a server; they can be replaced while it runs.
#[derive(Debug, Default)]
pub struct Keys {
    keys: RwLock<Option<Vec<Key>>>,
    quota: Quota,
    callers: Mutex<HashMap<String, Caller>>,
}

/// A request that was let in; while it lives it counts as under way.
#[derive(Debug)]
pub struct Admitted {
    keys: Arc<Keys>,
    /// Name of its key, empty where none is needed.
    pub name: String,
}

impl Keys {
    /// Keys and quota; without keys everybody is let in, under one quota.
    pub fn new(keys: Option<Vec<Key>>, quota: Quota) -> Arc<Self> {
        Arc::new(Self { keys: RwLock::new(keys), quota, callers: Mutex::default() })
    }

    /// Takes other keys from now on.
    pub fn replace(&self, keys: Vec<Key>) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Some(keys);
    }

    /// Name of the key in `headers`; empty where none is needed.
    ///
    /// # Errors
    /// When it is missing or wrong.
    pub fn check(&self, headers: &HeaderMap) -> Result<String, ApiError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let Some(keys) = &*keys else { return Ok(String::new()) };
        let bearer = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let bearer = bearer.and_then(|value| {
            let (scheme, rest) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| rest.trim())
        });
        let own = headers.get("x-api-key").and_then(|value| value.to_str().ok());
        let given = bearer.or(own).unwrap_or_default().as_bytes();
        // All are compared, so that time does not tell which one was nearly right.
        let mut found = None;
        for key in keys {
            if bool::from(key.secret.as_bytes().ct_eq(given)) {
                found = Some(key.name.clone());
            }
        }
        found.ok_or_else(ApiError::unauthorized)
    }

    /// Lets a request of `name` in.
    ///
    /// # Errors
    /// When its key has asked for too much.
    pub fn admit(self: &Arc<Self>, name: String) -> Result<Admitted, ApiError> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let full = f64::from(self.quota.per_minute.unwrap_or(u32::MAX));
        let caller = callers.entry(name.clone()).or_insert(Caller {
            tokens: full,
            updated: now,
            running: 0,
        });
        let refilled = now.duration_since(caller.updated).as_secs_f64() * full / 60.0;
        caller.tokens = (caller.tokens + refilled).min(full);
        caller.updated = now;
        if caller.tokens < 1.0 {
            let wait = Duration::from_secs_f64((1.0 - caller.tokens) * 60.0 / full);
            return Err(ApiError::too_many("too many requests in a minute for this key", wait));
        }
        if self.quota.concurrent.is_some_and(|most| caller.running >= most) {
            let message = "too many requests under way for this key";
            return Err(ApiError::too_many(message, Duration::from_secs(1)));
        }
        caller.tokens -= 1.0;
        caller.running += 1;
        drop(callers);
        Ok(Admitted { keys: self.clone(), name })
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut callers = self.keys.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(caller) = callers.get_mut(&self.name) {
            caller.running -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn headers(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn keys_are_read_from_lines_and_compared_whole() {
        let keys = Key::parse_all("# ours\nann:secret-of-ann\n\n  another-secret \n").unwrap();
        assert_eq!(keys[0].name, "ann");
        assert_eq!(keys[1], Key { name: "key-4".into(), secret: "another-secret".into() });
        assert!(Key::parse_all("ok:long-enough\nshort").unwrap_err().contains("line 2"));
        let keys = Keys::new(Some(keys), Quota::default());
        assert_eq!(keys.check(&headers("Bearer secret-of-ann")).unwrap(), "ann");
        assert_eq!(keys.check(&headers("bearer  another-secret")).unwrap(), "key-4");
        for wrong in ["Bearer secret-of-an", "Bearer secret-of-anna", "Basic secret-of-ann", "x"] {
            assert_eq!(keys.check(&headers(wrong)).unwrap_err().status, 401);
        }
        assert_eq!(keys.check(&HeaderMap::new()).unwrap_err().status, 401);
        keys.replace(Key::parse_all("later-secret").unwrap());
        assert!(keys.check(&headers("Bearer secret-of-ann")).is_err());
        assert!(keys.check(&headers("Bearer later-secret")).is_ok());
        assert_eq!(Keys::new(None, Quota::default()).check(&HeaderMap::new()).unwrap(), "");
    }

    #[test]
    fn a_key_has_its_share_and_no_more() {
        let quota = Quota { per_minute: Some(3), concurrent: Some(2) };
        let keys = Keys::new(None, quota);
        let (first, _second) = (keys.admit("a".into()).unwrap(), keys.admit("a".into()).unwrap());
        assert_eq!(keys.admit("a".into()).unwrap_err().status, 429);
        let other = keys.admit("b".into());
        assert!(other.is_ok(), "another key has its own share");
        drop(first);
        let third = keys.admit("a".into()).unwrap();
        drop(third);
        let error = keys.admit("a".into()).unwrap_err();
        assert_eq!(error.status, 429);
        let wait = error.retry_after.unwrap().as_secs_f64();
        assert!((15.0..=20.0).contains(&wait), "three a minute: the next in {wait} s");
    }
}
