//! The demonstration model compiled into the binary: glm-stories, see `docs/models/glm-stories.md`.

use anyhow::Result;
use marlin_checkpoint::Checkpoint;

/// What the embedded model is called where a path would stand.
pub const NAME: &str = "glm-stories (embedded)";

#[cfg(feature = "embedded-model")]
macro_rules! file {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../assets/glm-stories/", $name)).as_slice())
    };
}

/// Opens the embedded model.
#[cfg(feature = "embedded-model")]
pub fn open() -> Result<Checkpoint> {
    let files = [
        file!("config.json"),
        file!("generation_config.json"),
        file!("tokenizer.json"),
        file!("tokenizer_config.json"),
        file!("chat_template.jinja"),
        file!("model.safetensors"),
    ];
    Ok(Checkpoint::from_embedded(NAME, &files)?)
}

/// This binary has none.
#[cfg(not(feature = "embedded-model"))]
pub fn open() -> Result<Checkpoint> {
    Err(crate::exit::usage(
        "this binary was built without the embedded model; name one with -m, or build with the default features",
    ))
}
