//! The server that is measured.

use crate::exit;
use anyhow::Result;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

const CONNECT: Duration = Duration::from_secs(5);

/// Where requests go.
#[derive(Debug, Clone)]
pub struct Target {
    /// Of the server, the first that answers.
    pub address: SocketAddr,
    /// `Host` field.
    host: String,
    /// Path before `/v1`.
    prefix: String,
    api_key: Option<String>,
}

/// Host, port and path of `http://HOST[:PORT][/PATH]`; a `/v1` at the end is left out, as clients are told to write it.
fn parse(url: &str) -> Result<(String, u16, String), String> {
    let rest = match url.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
        Some((scheme, _)) => {
            return Err(format!("{scheme} is not measured; give the server's http address"));
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
        None => (authority, 80),
    };
    if host.is_empty() {
        return Err("it names no host".to_owned());
    }
    let path = path.trim_end_matches('/');
    Ok((host.to_owned(), port, path.strip_suffix("/v1").unwrap_or(path).to_owned()))
}

impl Target {
    /// Finds the server and sees that something listens there.
    ///
    /// # Errors
    /// A URL that is none, a host that is not known, a port where nothing listens.
    pub fn find(url: &str, api_key: Option<&str>) -> Result<Self> {
        let (host, port, prefix) =
            parse(url).map_err(|error| exit::usage(format!("URL {url}: {error}")))?;
        if api_key.is_some_and(|key| !key.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(exit::usage("--api-key: only visible ASCII characters can be sent"));
        }
        let name = host.trim_start_matches('[').trim_end_matches(']');
        let network = |error: std::io::Error| {
            exit::coded(exit::NETWORK, format!("{url}: {error}; is the server running?"))
        };
        let addresses = (name, port).to_socket_addrs().map_err(network)?;
        let mut last = std::io::Error::other("the host has no address");
        for address in addresses {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(_) => {
                    let api_key = api_key.map(str::to_owned);
                    return Ok(Self { address, host: format!("{host}:{port}"), prefix, api_key });
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
            ("http://127.0.0.1:8080", "127.0.0.1", 8080, ""),
            ("http://localhost/", "localhost", 80, ""),
            ("HTTP://[::1]:9/v1/", "[::1]", 9, ""),
            ("http://[::1]", "[::1]", 80, ""),
            ("http://host:81/a/b/v1", "host", 81, "/a/b"),
            ("http://host/v12", "host", 80, "/v12"),
        ] {
            assert_eq!(parse(url), Ok((host.to_owned(), port, prefix.to_owned())), "{url}");
        }
        for (url, words) in [
            ("https://host", "https is not measured"),
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
