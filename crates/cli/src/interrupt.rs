//! Ctrl-C: ends the program with 130, or first asks work that can end by itself to do so.

use crate::{console, exit};
use anyhow::Result;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Whether there is work that looks at [`STOP`].
static STOPPABLE: AtomicBool = AtomicBool::new(false);
/// Whether it was asked to end.
static STOP: AtomicBool = AtomicBool::new(false);
/// What to say when Ctrl-C is pressed.
static WORDS: Mutex<Option<&str>> = Mutex::new(None);

/// Takes Ctrl-C from here on.
///
/// # Errors
/// When the operating system refuses the handler.
pub fn catch() -> Result<()> {
    ctrlc::set_handler(|| {
        let asked = STOPPABLE.load(Ordering::SeqCst) && !STOP.swap(true, Ordering::SeqCst);
        if let Some(words) = WORDS.lock().unwrap_or_else(PoisonError::into_inner).take() {
            console::note(words);
        }
        if !asked {
            std::process::exit(i32::from(exit::INTERRUPTED));
        }
    })?;
    Ok(())
}

/// Says `words` at the next Ctrl-C.
pub fn say(words: &'static str) {
    *WORDS.lock().unwrap_or_else(PoisonError::into_inner) = Some(words);
}

/// Work begins that ends by itself once what is returned is true; only a second Ctrl-C ends the program.
pub fn begin() -> &'static AtomicBool {
    STOP.store(false, Ordering::SeqCst);
    STOPPABLE.store(true, Ordering::SeqCst);
    &STOP
}

/// The work is over: Ctrl-C ends the program again.
pub fn end() {
    STOPPABLE.store(false, Ordering::SeqCst);
}
