use super::*;

const KINDS: [(&str, [usize; 2]); 9] = [
    ("self_attn.q_a_proj", [192, 384]),
    ("self_attn.q_b_proj", [768, 192]),
    ("self_attn.kv_a_proj_with_mqa", [160, 384]),
    ("self_attn.o_proj", [384, 512]),
    ("mlp.experts.0.gate_proj", [192, 384]),
    ("mlp.experts.1.up_proj", [192, 384]),
    ("mlp.experts.2.down_proj", [384, 192]),
    ("mlp.shared_experts.gate_proj", [192, 384]),
    ("mlp.shared_experts.down_proj", [384, 192]),
];

/// A page with everything on it, and names that would break it if they were not escaped.
fn report() -> QuantizationReport {
    let tensor = |i: usize| {
        let (layer, (kind, shape)) = (i / KINDS.len(), KINDS[i % KINDS.len()]);
        let bits = 2.0 + ((i * 7) % 5) as f64 * 0.5;
        let error = (-1.3 * bits).exp() * (0.4 + 0.05 * ((i * 13) % 11) as f64);
        TensorRow {
            name: format!("model.layers.{layer}.{kind}.weight"),
            bits,
            shape,
            proxy_error: error * 0.9,
            relative_output_error: if i == 3 { 0.0 } else { error },
            cosine: 1.0 - error / 2.0,
            seconds: 0.5 + i as f64 * 0.01,
            tokens: 131_072 >> (i % 4),
            fallback: (i == 5).then(|| "12 tokens < 64: Hessian of <all> & \"none\"".to_owned()),
        }
    };
    let quality = |name: &str, bits_per_weight, perplexity, kl_divergence| QualityRow {
        name: name.to_owned(),
        bits_per_weight,
        file_bytes: (bits_per_weight * 4.88e6) as u64,
        perplexity,
        kl_divergence,
    };
    QuantizationReport {
        title: "glm-stories <at> 3.0 & 'more'".to_owned(),
        summary: [
            ("source", "glm-stories, bf16"),
            ("format", "exl3"),
            ("bits per weight", "3.401 of the linears, 6.046 of the head, 4.14 of all"),
            ("calibration", "131,072 tokens"),
            ("time", "4 min 12 s"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec(),
        quality: vec![
            quality("bf16", 16.0, 4.1638, None),
            quality(
                "a very long name of a model, as a path to a folder may be: 3.0",
                3.4,
                4.4272,
                Some(0.0675),
            ),
            quality("4.0", 4.2, 4.2244, Some(0.0197)),
        ],
        tensors: (0..7 * KINDS.len()).map(tensor).collect(),
        experts: (1..7)
            .map(|layer| ExpertRow {
                layer,
                counts: (0..16)
                    .map(|e| ((e * e * 37 + layer as u64 * 91) % 700) * u64::from(e != 9))
                    .collect(),
            })
            .collect(),
    }
}

/// Elements that are open at the end, after every tag was found to match.
fn check_well_formed(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    let body = page.strip_prefix("<!DOCTYPE html>").expect("a document type");
    for (i, part) in body.split('<').enumerate().skip(1) {
        let (tag, text) =
            part.split_once('>').unwrap_or_else(|| panic!("tag {i} never ends: {part}"));
        assert!(!text.contains('>'), "a bare > after <{tag}>: {text}");
        let style = open.last() == Some(&"style") || tag == "style";
        assert!(
            style || !text.contains('&') || text.split('&').skip(1).all(|e| e.contains(';')),
            "{text}"
        );
        assert_eq!(tag.matches('"').count() % 2, 0, "quotes of <{tag}>");
        let name = tag.split([' ', '/']).find(|n| !n.is_empty()).unwrap();
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "</{name}> in {part}");
        } else if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
}

#[test]
fn the_page_is_well_formed_and_holds_the_rows() {
    let report = report();
    let page = html(&report);
    if let Ok(written) = std::env::var("MARLIN_REPORT_SAMPLE") {
        std::fs::write(written, &page).unwrap();
    }
    check_well_formed(&page);
    for row in &report.tensors {
        assert!(page.contains(&format!("<th scope=\"row\" class=\"word\">{}</th>", row.name)));
    }
    assert!(page.contains("<title>glm-stories &lt;at&gt; 3.0 &amp; &#39;more&#39;</title>"));
    assert!(page.contains("12 tokens &lt; 64: Hessian of &lt;all&gt; &amp; &quot;none&quot;"));
    assert!(page.contains("not in the charts: 1."));
    assert!(page.contains("expert 9: 0 tokens"));
    assert_eq!(page.matches("<figure>").count(), 5);
    for outside in ["http", "src=", "url(", "@import", "<script"] {
        assert!(!page.contains(outside), "{outside}");
    }
    // A mark for every matrix that has an error, in two charts, besides those of the legends.
    let marks = page.matches("class=\"mark\"").count();
    assert_eq!(marks, 2 * (report.tensors.len() - 1) + 2 * chart::COLOURS);
}

#[test]
fn an_empty_report_is_a_page() {
    let page = html(&QuantizationReport::default());
    check_well_formed(&page);
    assert!(!page.contains("<figure>") && !page.contains("<table>"));
    let mut odd = report();
    odd.tensors.truncate(1);
    odd.tensors[0].relative_output_error = f64::NAN;
    odd.quality[0].perplexity = f64::INFINITY;
    check_well_formed(&html(&odd));
}

#[test]
fn matrices_have_layers_and_kinds() {
    let base = report().tensors.remove(0);
    for (name, layer, kind) in [
        ("model.layers.12.self_attn.q_proj.weight", Some(12), "q_proj"),
        ("model.layers.3.mlp.experts.17.down_proj", Some(3), "experts down_proj"),
        ("model.layers.3.mlp.shared_experts.up_proj", Some(3), "shared up_proj"),
        ("lm_head", None, "lm_head"),
    ] {
        let row = TensorRow { name: name.to_owned(), ..base.clone() };
        assert_eq!((row.layer(), row.kind().as_str()), (layer, kind));
    }
    // The error is one of norms: the chart had half the decibels.
    let tenth = TensorRow { relative_output_error: 0.1, ..base };
    assert!((tenth.signal_to_noise().unwrap() - 20.0).abs() < 1e-9);
}
