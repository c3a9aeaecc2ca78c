//! The server that is measured.

use super::connection::{Tls, Trust};
use crate::exit;
use anyhow::Result;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Time for a connection to stand.
pub const CONNECT: Duration = Duration::from_secs(5);

/// Where requests go.
#[derive(Debug, Clone)]
pub struct Target {
    /// Of the server, the first that answers.
    pub address: SocketAddr,
    /// Set for `https`.
    pub tls: Option<Tls>,
    /// `Host` field.
    host: String,
    /// Path before `/v1`.
    prefix: String,
    api_key: Option<String>,
}

/// Whether there is TLS, and host, port and path, of `http[s]://HOST[:PORT][/PATH]`; a `/v1` at the end is left out, as
/// clients are told to write it.
fn parse(url: &str) -> Result<(bool, String, u16, String), String> {
    let (secure, rest) = match url.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (false, rest),
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (true, rest),
        Some((scheme, _)) => {
            return Err(format!(
                "{scheme} is not measured; give the server's http or https address"
            ));
        }
        None => return Err(format!("expected http://{url}")),
    };
    if let Some(odd) =
        rest.chars().find(|c| c.is_whitespace() || c.is_control() || "@?#".contains(*c))
    {
        return Err(format!("{odd:?} cannot be part of it"));
    }
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    // The colons of an IPv6 address stand in brackets.
    let port_at = authority.rfind(':').filter(|&at| !authority[at..].contains(']'));
    let (host, port) = match port_at {
        Some(at) => {
            let port = authority[at + 1..]
                .parse()
                .map_err(|e| format!("port {:?}: {e}", &authority[at + 1..]))?;
            (&authority[..at], port)
        }
        None => (authority, if secure { 443 } else { 80 }),
    };
    if host.is_empty() {
        return Err("it names no host".to_owned());
    }
    let path = path.trim_end_matches('/');
    Ok((secure, host.to_owned(), port, path.strip_suffix("/v1").unwrap_or(path).to_owned()))
}

impl Target {
    /// Finds the server and sees that something listens there.
    ///
    /// # Errors
    /// A URL that is none, a host that is not known, a port where nothing listens, a certificate that is not believed.
    pub fn find(url: &str, api_key: Option<&str>, trust: Trust) -> Result<Self> {
        let (secure, host, port, prefix) =
            parse(url).map_err(|error| exit::usage(format!("URL {url}: {error}")))?;
        if api_key.is_some_and(|key| !key.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(exit::usage("--api-key: only visible ASCII characters can be sent"));
        }
        let name = host.trim_start_matches('[').trim_end_matches(']');
        let network = |error: std::io::Error| {
            exit::coded(exit::NETWORK, format!("{url}: {error}; is the server running?"))
        };
        let tls = if secure { Some(Tls::new(name, trust)?) } else { None };
        let addresses = (name, port).to_socket_addrs().map_err(network)?;
        let mut last = std::io::Error::other("the host has no address");
        for address in addresses {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => {
                    if let Some(tls) = &tls {
                        let failed = |error| {
                            let advice =
                                "--ca-file names a certificate to believe, --insecure believes any";
                            exit::coded(exit::NETWORK, format!("{url}: {error}; {advice}"))
                        };
                        tls.try_over(stream).map_err(failed)?;
                    }
                    let (host, api_key) = (format!("{host}:{port}"), api_key.map(str::to_owned));
                    return Ok(Self { address, tls, host, prefix, api_key });
                }
                Err(error) => last = error,
            }
        }
        Err(network(last))
    }

    /// The HTTP message that posts `body` to `path`.
    pub fn post(&self, path: &str, body: &[u8]) -> Vec<u8> {
        let (host, prefix) = (&self.host, &self.prefix);
        let key = self
            .api_key
            .as_ref()
            .map_or_else(String::new, |key| format!("Authorization: Bearer {key}\r\n"));
        let head = format!(
            "POST {prefix}{path} HTTP/1.1\r\nHost: {host}\r\n{key}Content-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        [head.as_bytes(), body].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn urls_are_taken_apart() {
        for (url, host, port, prefix) in [
            ("https://example.org", "example.org", 443, ""),
            ("HTTPS://[::1]:8443/v1", "[::1]", 8443, ""),
            ("http://127.0.0.1:8080", "127.0.0.1", 8080, ""),
            ("http://localhost/", "localhost", 80, ""),
            ("HTTP://[::1]:9/v1/", "[::1]", 9, ""),
            ("http://[::1]", "[::1]", 80, ""),
            ("http://host:81/a/b/v1", "host", 81, "/a/b"),
            ("http://host/v12", "host", 80, "/v12"),
        ] {
            let secure = url.to_lowercase().starts_with("https");
            let expected = (secure, host.to_owned(), port, prefix.to_owned());
            assert_eq!(parse(url), Ok(expected), "{url}");
        }
        for (url, words) in [
            ("ftp://host", "ftp is not measured"),
            ("127.0.0.1:8080", "expected http://127.0.0.1:8080"),
            ("http://:80", "no host"),
            ("http://host:port", "port \"port\""),
            ("http://host:99999", "99999"),
            ("http://me@host", "'@'"),
            ("http://host/a b", "' '"),
            ("http://host/\r\nX: y", "'\\r'"),
        ] {
            let error = parse(url).unwrap_err();
            assert!(error.contains(words), "{url}: {error}");
        }
    }
}
