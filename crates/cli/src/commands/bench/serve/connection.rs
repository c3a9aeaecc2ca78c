//! A connection that never waits, with TLS or without.

use super::target::{CONNECT, Target};
use crate::exit;
use anyhow::{Context, Result};
use marlin_server::rustls::client::WebPkiServerVerifier;
use marlin_server::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use marlin_server::rustls::pki_types::pem::PemObject;
use marlin_server::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use marlin_server::rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    Stream,
};
use mio::net::TcpStream;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;

/// Which certificates are believed.
#[derive(Debug, Clone, Copy)]
pub enum Trust<'a> {
    /// Those of public authorities.
    Public,
    /// Those of this PEM file, and what they have signed.
    File(&'a Path),
    /// Any.
    Anybody,
}

/// What it takes to speak TLS to the server.
#[derive(Debug, Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Tls {
    /// To a server called `host`, an address or a name.
    ///
    /// # Errors
    /// When the name is none, or the file of certificates cannot be read.
    pub fn new(host: &str, trust: Trust) -> Result<Self> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| exit::usage(format!("URL: host {host:?}: {error}")))?;
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.into() };
        if let Trust::File(file) = trust {
            roots = RootCertStore::empty();
            let told = || file.display().to_string();
            for certificate in CertificateDer::pem_file_iter(file).with_context(told)? {
                roots.add(certificate.with_context(told)?).with_context(told)?;
            }
            if roots.is_empty() {
                return Err(exit::usage(format!("{}: no certificate in it", told())));
            }
        }
        let mut config = match trust {
            Trust::Anybody => {
                let checks = WebPkiServerVerifier::builder(Arc::new(roots)).build()?;
                let verifier = Arc::new(Unverified { checks });
                let builder = ClientConfig::builder().dangerous();
                builder.with_custom_certificate_verifier(verifier).with_no_client_auth()
            }
            _ => ClientConfig::builder().with_root_certificates(roots).with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self { config: Arc::new(config), name })
    }

    fn session(&self) -> Result<ClientConnection, Error> {
        ClientConnection::new(self.config.clone(), self.name.clone())
    }

    /// Greets the server over `stream`, so that what is wrong with its certificate is told before any load.
    ///
    /// # Errors
    /// When it is no TLS, or is not believed.
    pub fn try_over(&self, mut stream: std::net::TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(CONNECT))?;
        stream.set_write_timeout(Some(CONNECT))?;
        let mut session = self.session().map_err(io::Error::other)?;
        while session.is_handshaking() {
            session.complete_io(&mut stream)?;
        }
        Ok(())
    }
}

/// Takes every certificate; that its owner has the key is still seen.
#[derive(Debug)]
struct Unverified {
    checks: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.checks.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.checks.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.checks.supported_verify_schemes()
    }
}

/// A connection to the server. Reading and writing fail with `WouldBlock` or `NotConnected` where they would wait.
pub enum Connection {
    /// As it is.
    Plain(TcpStream),
    /// Below TLS. What was written and has not gone out goes with the next read or write.
    Tls(TcpStream, Box<ClientConnection>),
}

impl Connection {
    /// Begins to connect.
    ///
    /// # Errors
    /// When the system has no connection.
    pub fn open(target: &Target) -> io::Result<Self> {
        let stream = TcpStream::connect(target.address)?;
        // Fails before the connection stands on some systems; a request is one write, so little is lost.
        let _ = stream.set_nodelay(true);
        match &target.tls {
            None => Ok(Self::Plain(stream)),
            Some(tls) => {
                let session = tls.session().map_err(io::Error::other)?;
                Ok(Self::Tls(stream, Box::new(session)))
            }
        }
    }

    /// What the system watches.
    pub fn socket(&mut self) -> &mut TcpStream {
        match self {
            Self::Plain(stream) | Self::Tls(stream, _) => stream,
        }
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream, session) => Stream::new(session.as_mut(), stream).read(buffer),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream, session) => Stream::new(session.as_mut(), stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream, session) => Stream::new(session.as_mut(), stream).flush(),
        }
    }
}
