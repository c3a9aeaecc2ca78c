//! The web page, part of the binary.

use super::Server;
use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::routing::get;
use std::sync::Arc;

/// Nothing from elsewhere, nothing inline.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

macro_rules! files {
    ($(($path:literal, $kind:expr, $file:literal)),* $(,)?) => {
        &[$(($path, $kind, include_str!(concat!("../../page/", $file)))),*]
    };
}

/// Path, type, content.
const FILES: &[(&str, &str, &str)] = files![
    ("/", HTML, "index.html"),
    ("/page/favicon.svg", SVG, "favicon.svg"),
    ("/page/style.css", CSS, "style.css"),
    ("/page/theme.js", SCRIPT, "theme.js"),
    ("/page/app.js", SCRIPT, "app.js"),
    ("/page/api.js", SCRIPT, "api.js"),
    ("/page/sse.js", SCRIPT, "sse.js"),
    ("/page/store.js", SCRIPT, "store.js"),
    ("/page/conversation.js", SCRIPT, "conversation.js"),
    ("/page/sidebar.js", SCRIPT, "sidebar.js"),
    ("/page/settings.js", SCRIPT, "settings.js"),
    ("/page/view.js", SCRIPT, "view.js"),
    ("/page/markdown.js", SCRIPT, "markdown.js"),
];

/// The paths of the page.
pub(super) fn router() -> Router<Arc<Server>> {
    FILES.iter().fold(Router::new(), |router, &(path, kind, content)| {
        let answer = move || async move {
            let headers = [
                (CONTENT_TYPE, kind),
                (CONTENT_SECURITY_POLICY, POLICY),
                (X_CONTENT_TYPE_OPTIONS, "nosniff"),
                (REFERRER_POLICY, "no-referrer"),
                (CACHE_CONTROL, "no-cache"),
            ];
            (headers, content)
        };
        router.route(path, get(answer))
    })
}
