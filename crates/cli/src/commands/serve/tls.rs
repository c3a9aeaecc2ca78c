//! Certificates.

use anyhow::{Context, Result, bail};
use marlin_server::rustls::ServerConfig;
use marlin_server::rustls::pki_types::pem::PemObject;
use marlin_server::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::path::Path;

/// TLS with a chain of certificates and its key, both PEM.
pub fn config(cert: &Path, key: &Path) -> Result<ServerConfig> {
    let chain = CertificateDer::pem_file_iter(cert).with_context(|| cert.display().to_string())?;
    let chain = chain.collect::<Result<Vec<_>, _>>();
    let chain = chain.with_context(|| cert.display().to_string())?;
    if chain.is_empty() {
        bail!("{}: no certificate in it", cert.display());
    }
    let secret = PrivateKeyDer::from_pem_file(key).with_context(|| key.display().to_string())?;
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, secret);
    let mut config = config.with_context(|| format!("{} and {}", cert.display(), key.display()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}
