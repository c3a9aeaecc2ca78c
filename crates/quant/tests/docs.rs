//! The page of formats says what the code does.

use marlin_quant::{QuantError, formats};
use std::fmt::Write;
use std::path::Path;

fn page() -> String {
    let mut page = String::from(
        "# Weight formats\n\n\
         Written by `crates/quant/tests/docs.rs`; do not edit.\n\n\
         A format is recognised by the tensors stored for a layer, here `KEY`, and is tried in this\n\
         order. Every format has a scalar decode that defines it; `marlin inspect` prints which faster\n\
         path a tensor takes. \"Encoder\" is rounding to nearest without calibration, for tests, benches\n\
         and plain conversions.\n\n\
         The block types of GGUF: [ggml.md](ggml.md). GPTQ, AWQ and compressed-tensors: [integer.md](integer.md).\n\n\
         | format | bits per weight | recognised by | encoder |\n\
         | --- | --- | --- | --- |\n",
    );
    for format in formats() {
        let facts = format.describe();
        let packs = match format.pack(&vec![0.0; 256 * 256], 256, 256) {
            Ok(_) => "yes",
            Err(QuantError::NoPacker { .. }) => "no",
            Err(error) => panic!("{}: {error}", format.id()),
        };
        let (id, bits, by) = (format.id(), facts.bits_per_weight, facts.detected_by);
        writeln!(page, "| `{id}` | {bits} | {by} | {packs} |").unwrap();
    }
    page
}

#[test]
fn the_page_of_formats_is_current() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/formats/README.md");
    let fresh = page();
    if std::fs::read_to_string(&committed).unwrap_or_default() != fresh {
        let written = Path::new(env!("CARGO_TARGET_TMPDIR")).join("formats.md");
        std::fs::write(&written, fresh).unwrap();
        panic!("out of date: cp {} {}", written.display(), committed.display());
    }
}

#[test]
fn the_page_of_ggml_types_has_every_type() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/formats/ggml.md");
    let page = std::fs::read_to_string(page).unwrap();
    for format in formats() {
        let facts = format.describe();
        if let Some((_, ggml_type)) = facts.detected_by.split_once("GGUF type ") {
            let ggml_type = ggml_type.split(',').next().unwrap();
            let row = format!("| {ggml_type} | {} |", facts.bits_per_weight);
            assert!(page.contains(&row), "no row {row}");
        }
    }
}

#[test]
fn the_page_of_integers_has_every_format() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/formats/integer.md");
    let page = std::fs::read_to_string(page).unwrap();
    for format in formats().iter().filter(|f| f.id().starts_with("int")) {
        let bits = format.describe().bits_per_weight;
        let row = format!("| `{}` | {bits} |", format.id().trim_end_matches("_ordered"));
        assert!(page.contains(&row), "no row {row}");
    }
}

#[test]
fn identifiers_are_unique() {
    let mut ids: Vec<_> = formats().iter().map(|f| f.id()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), formats().len());
}
