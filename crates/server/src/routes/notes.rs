//! What a request says for its operator: `user` and `metadata` stand in the request's line of the log.

use crate::Fields;
use serde_json::Value;
use std::sync::{Arc, OnceLock};

/// Most bytes of either in the log.
const MOST: usize = 1024;

/// What one request said.
#[derive(Debug, Clone, Default)]
pub(super) struct Note {
    /// `user`, or `safety_identifier`, its newer name.
    pub user: Option<String>,
    /// `metadata` as JSON.
    pub metadata: Option<String>,
}

/// Filled once the body has been read.
pub(super) type Notes = Arc<OnceLock<Note>>;

tokio::task_local! {
    static CURRENT: Notes;
}

/// Runs `work`, which may take notes.
pub(super) async fn within<T>(notes: &Notes, work: impl Future<Output = T>) -> T {
    CURRENT.scope(notes.clone(), work).await
}

/// What was noted.
pub(super) fn taken(notes: &Notes) -> Note {
    notes.get().cloned().unwrap_or_default()
}

/// Notes what `fields` say, if a request is being worked on.
pub(super) fn note(fields: &Fields) {
    let text = |name: &str| fields.peek(name).and_then(Value::as_str).map(str::to_owned);
    let metadata = fields.peek("metadata").filter(|value| value.is_object());
    let note = Note {
        user: text("user").or_else(|| text("safety_identifier")).map(short),
        metadata: metadata.map(|value| short(value.to_string())),
    };
    // Outside a request nobody listens.
    let _ = CURRENT.try_with(|notes| notes.set(note));
}

fn short(mut text: String) -> String {
    if text.len() > MOST {
        text.truncate(text.floor_char_boundary(MOST));
        text.push('…');
    }
    text
}
