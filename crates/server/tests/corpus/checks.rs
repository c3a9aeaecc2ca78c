//! What must hold of any body; run by the fuzz target and over the inputs that are kept.

use marlin_server::read_body;

/// Paths that read JSON bodies.
const PATHS: [&str; 10] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/perplexity",
    "/tokenize",
    "/detokenize",
    "/apply-template",
];

/// A body is read, or refused with a 4xx that says why.
pub fn request(body: &[u8]) {
    for path in PATHS {
        if let Err(error) = read_body(path, body) {
            assert!(error.status.is_client_error(), "{path}: {error}");
            assert!(!error.message.is_empty() && error.message.len() < 2000, "{path}: {error}");
        }
    }
}
