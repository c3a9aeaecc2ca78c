//! A quantization from an opened source to a finished directory, resumable at every matrix.

use crate::error::ConvertError;
use crate::exl3::table::quantize_table;
use crate::exl3::{Exl3Quantizer, PADDING};
use crate::hessian::{Hessian, Hessians};
use crate::memory;
use crate::moments::Moments;
use crate::options::{JobOptions, KEPT};
use crate::origin::{Named, Origin, half};
use crate::output::{self, Module};
use crate::plan::{Plan, Role, Target, in_order, with_labels};
use crate::pooling::{Pools, Through, pool_of, prepare};
use crate::quantizer::{TensorReport, quantize_linear};
use crate::report::{Clock, JobReport, Watch, fingerprint, fnv, hash};
use crate::store::{Store, named};
use crate::stream::Stream;
use marlin_checkpoint::{Checkpoint, Container, write_file};
use marlin_models::LinearSpec;
use marlin_tensor::Backend;
use rayon::prelude::*;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

type Result<T> = std::result::Result<T, ConvertError>;

/// How a job gets on.
#[derive(Debug, Clone)]
pub enum Event {
    /// Matrices and weights that an earlier run already finished, of how many.
    Resumed {
        /// Matrices.
        matrices: usize,
        /// Their weights.
        weights: u64,
    },
    /// Calibration rows pass through a part of the model.
    Rows {
        /// `"layer 3"`, `"head"`.
        part: String,
        /// Whether moments are gathered, or states advanced.
        capture: bool,
        /// Rows done.
        row: usize,
        /// Rows in all.
        rows: usize,
    },
    /// A matrix is at work.
    Within {
        /// Its key.
        key: String,
        /// Hundredths of it that are done.
        percent: usize,
    },
    /// A matrix is finished and kept; this is how it fared.
    Matrix(TensorReport),
    /// The directory is being written.
    Writing,
    /// All but its configuration is written and now read back.
    Verifying,
}

/// Everything a running job refers to.
struct Job<'a> {
    origin: Origin<'a>,
    plan: Plan,
    store: Store,
    quantizer: &'a Exl3Quantizer,
    options: &'a JobOptions,
    backend: Arc<dyn Backend>,
    events: &'a (dyn Fn(Event) + Sync),
    stop: &'a AtomicBool,
    clock: Mutex<Clock>,
}

/// Quantizes `checkpoint` into `options.output`.
///
/// # Errors
/// When the source cannot be read, the output not written, memory or disk do not suffice, or `stop` was
/// set; what was finished is kept and found by the next run.
pub fn run(
    checkpoint: &Checkpoint,
    backend: Arc<dyn Backend>,
    quantizer: &Exl3Quantizer,
    options: &JobOptions,
    events: &(dyn Fn(Event) + Sync),
    stop: &AtomicBool,
) -> Result<JobReport> {
    let start = Instant::now();
    let origin = Origin::open(checkpoint)?;
    let plan = Plan::new(&origin.output, origin.mtp);
    assert_eq!(plan.groups.len(), options.bits.len(), "one rate per group");
    if options.tied {
        options.check_tied(&origin, &plan)?;
    }
    let settings = json!({
        "source": fingerprint(checkpoint),
        "format": "exl3",
        "codebook": quantizer.codebook.name(),
        "bits": hash(&json!(options.bits)),
        "embedding_bits": options.embedding_bits,
        "tied": options.tied,
        "calibration": hash(&json!(options.calibration.rows)),
        "seed": options.seed,
        "quantizer": quantizer.options,
        "version": env!("CARGO_PKG_VERSION"),
    });
    std::fs::create_dir_all(&options.output)
        .map_err(|source| ConvertError::Io { path: options.output.clone(), source })?;
    memory::check_disk(&options.output, &plan, &origin, options)?;
    memory::check(&plan, &origin, options)?;
    let store = Store::open(&options.output, &settings, options.fresh)?;
    let pool = pool(options.threads)?;
    let clock = Mutex::default();
    let job = Job { origin, plan, store, quantizer, options, backend, events, stop, clock };
    pool.install(|| job.run())?;
    let mut clock = *job.clock.lock().unwrap_or_else(PoisonError::into_inner);
    let mut watch = Watch::start();
    let report = job.finish(checkpoint)?;
    clock.writing = watch.lap();
    let seconds = start.elapsed().as_secs_f64();
    Ok(JobReport { seconds, clock, encoder: quantizer.encoder.name(), ..report })
}

/// Threads for the arithmetic of a job.
pub(crate) fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.max(1)).build();
    pool.map_err(|e| ConvertError::Option { field: "--threads".to_owned(), reason: e.to_string() })
}

impl Job<'_> {
    /// Does `work` and adds its time to what `part` picks.
    fn timed<T>(&self, part: fn(&mut Clock) -> &mut f64, work: impl FnOnce() -> T) -> T {
        let mut watch = Watch::start();
        let done = work();
        *part(&mut self.clock.lock().unwrap_or_else(PoisonError::into_inner)) += watch.lap();
        done
    }

    fn check(&self) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(ConvertError::Stopped) } else { Ok(()) }
    }

    fn run(&self) -> Result<()> {
        let done: Vec<&Target> = self.plan.targets.iter().filter(|t| self.finished(t)).collect();
        if !done.is_empty() {
            let weights = done.iter().map(|t| t.weights()).sum();
            (self.events)(Event::Resumed { matrices: done.len(), weights });
        }
        let layers = self.plan.layers;
        for layer in 0..layers {
            let part = format!("layer {layer}");
            let targets = self.plan.targets_of(layer);
            let next_kept = || (layer + 1..=layers).any(|l| self.stream(&|_| Ok(())).has(l));
            if targets.iter().all(|t| self.finished(t)) && next_kept() {
                continue;
            }
            if layer == 0 {
                self.timed(
                    |clock| &mut clock.advance,
                    || {
                        let tick = self.tick(&part, false);
                        let table = if self.options.tied { None } else { Some(self.embedding()?) };
                        self.stream(&tick).embed(table)
                    },
                )?;
            }
            self.in_passes(&part, &targets, |stream, labels| stream.capture(layer, labels))?;
            let tick = self.tick(&part, false);
            let stream = self.stream(&tick);
            let tensors = match self.quantizer.options.calibration.through {
                Through::Quantized => self.block_tensors(layer)?,
                Through::Source => self.origin.source_tensors(&self.plan, layer, None)?,
            };
            self.timed(|clock| &mut clock.advance, || stream.advance(layer, tensors))?;
            stream.states(layer).remove();
        }
        let head = self.plan.targets_with(Role::Head);
        match head.iter().all(|t| self.is_kept(t)) {
            true => self.quantize(&head, Hessians::new(), &BTreeSet::new(), &Pools::default())?,
            false => self.in_passes("head", &head, |stream, labels| {
                labels.into_iter().map(|label| Ok((label, stream.head()?))).collect()
            })?,
        }
        let ahead = self.plan.targets_with(Role::Prediction);
        self.in_passes("prediction layer", &ahead, |stream, labels| stream.prediction(labels))
    }

    /// Gathers the moments of `targets` in as many passes as memory asks for, and quantizes what is not
    /// finished after each.
    fn in_passes(
        &self,
        part: &str,
        targets: &[&Target],
        gather: impl Fn(&Stream, BTreeSet<String>) -> Result<Hessians>,
    ) -> Result<()> {
        let passes = memory::passes(targets, &self.origin, self.options);
        let gathered = |labels: &BTreeSet<String>| {
            let tick = self.tick(part, true);
            self.timed(|clock| &mut clock.moments, || gather(&self.stream(&tick), labels.clone()))
        };
        let names: BTreeSet<String> =
            targets.iter().filter_map(|t| pool_of(&t.spec.label)).collect();
        // A starved expert borrows from all others of its block, also from those of other passes.
        let shared = passes.len() > 1 && !names.is_empty();
        let kept_pools = Moments::of_pools(&self.store.path, &names);
        let mut pools = Pools::default();
        if shared && !targets.iter().all(|t| self.finished(t)) {
            pools = match kept_pools.read() {
                Some(sums) => sums.into(),
                None => {
                    for labels in &passes {
                        pools.add(&gathered(labels)?, in_order(&with_labels(targets, labels)));
                    }
                    kept_pools.write(pools.sums())?;
                    pools
                }
            };
        }
        for labels in &passes {
            let chosen = with_labels(targets, labels);
            let kept = Moments::of(&self.store.path, labels);
            if chosen.iter().all(|t| self.finished(t)) {
                continue;
            }
            let hessians = match kept.read() {
                Some(hessians) => hessians,
                None => {
                    let hessians = gathered(labels)?;
                    kept.write(&hessians)?;
                    hessians
                }
            };
            if !shared {
                pools.add(&hessians, in_order(&chosen));
            }
            self.quantize(&chosen, hessians, labels, &pools)?;
            kept.remove();
        }
        kept_pools.remove();
        Ok(())
    }

    fn finished(&self, target: &Target) -> bool {
        self.store.has(&self.origin.output_key(&target.spec))
    }

    fn tick<'t>(
        &'t self,
        part: &'t str,
        capture: bool,
    ) -> impl Fn(usize) -> Result<()> + Sync + 't {
        let rows = self.options.calibration.rows.len();
        move |row| {
            self.check()?;
            (self.events)(Event::Rows { part: part.to_owned(), capture, row, rows });
            Ok(())
        }
    }

    fn stream<'t>(&'t self, tick: &'t (dyn Fn(usize) -> Result<()> + Sync)) -> Stream<'t> {
        Stream {
            origin: &self.origin,
            backend: self.backend.clone(),
            calibration: &self.options.calibration,
            directory: &self.store.path,
            tick,
        }
    }

    /// The embedding as the output has it.
    fn embedding(&self) -> Result<Vec<Named>> {
        let bits = self.options.embedding_bits;
        if bits.is_none() && self.origin.embedding_memory()? == 0 {
            return Ok(vec![self.origin.embedding()?]);
        }
        let spec = self.origin.embedding_spec();
        let key = self.origin.output_key(&spec);
        if !self.store.has(&key) {
            let start = Instant::now();
            let shape = [spec.out_features, spec.in_features];
            let tensors = match bits {
                None => vec![self.origin.embedding()?],
                Some(bits) => {
                    let seed = self.options.seed ^ fnv(key.as_bytes());
                    let read = |rows| self.origin.rows(&spec, rows);
                    let encoder = self.quantizer.encoder.as_ref();
                    named(&key, quantize_table(shape, &read, bits, encoder, seed)?, None)
                }
            };
            let mut report = TensorReport::uncalibrated(&key, shape, bits.unwrap_or(16) as f64);
            report.seconds = start.elapsed().as_secs_f64();
            self.store.put(&report, &tensors)?;
        }
        // As a mapped file: the system takes its memory back when it needs some.
        Ok(self.store.get(&key)?.1)
    }

    /// Quantizes what is not finished of `targets`, a few at a time.
    fn quantize(
        &self,
        targets: &[&Target],
        mut hessians: Hessians,
        labels: &BTreeSet<String>,
        pools: &Pools,
    ) -> Result<()> {
        let rule = self.quantizer.options.calibration;
        let notes = prepare(rule.moments, &mut hessians, labels, pools);
        let mut pending: Vec<&&Target> = targets.iter().filter(|t| !self.finished(t)).collect();
        // The longest first: what begins last is all there is to do at the end.
        pending.sort_by_key(|t| std::cmp::Reverse(t.spec.in_features * t.spec.in_features));
        let jobs = memory::jobs(targets, &self.origin, self.options).min(pending.len());
        let next = AtomicUsize::new(0);
        let one_after_the_other = |_| {
            while let Some(target) = pending.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.check()?;
                self.quantize_one(target, hessians.get(&target.spec.label), &notes)?;
            }
            Ok(())
        };
        self.timed(
            |clock| &mut clock.matrices,
            || (0..jobs).into_par_iter().with_max_len(1).try_for_each(one_after_the_other),
        )
    }

    /// Whether `target` is an output projection that stays as it is.
    fn is_kept(&self, target: &Target) -> bool {
        target.is_head() && self.options.bits[target.group] == KEPT
    }

    fn quantize_one(
        &self,
        target: &Target,
        hessian: Option<&Hessian>,
        notes: &BTreeMap<String, String>,
    ) -> Result<()> {
        let start = Instant::now();
        if self.is_kept(target) {
            return self.keep(&target.spec, start);
        }
        let (spec, bits) = (&target.spec, self.options.bits[target.group]);
        let (key, told) = (self.origin.output_key(spec), AtomicUsize::new(0));
        let progress = |share: f64| {
            let percent = ((share * 100.0) as usize).min(100);
            // A matrix has many more tiles than anybody wants to be told of.
            if told.fetch_max(percent, Ordering::Relaxed) < percent {
                (self.events)(Event::Within { key: key.clone(), percent });
            }
        };
        let seed = self.options.seed;
        let (packed, mut report) =
            quantize_linear(self.quantizer, &self.origin, spec, hessian, seed, bits, &progress)?;
        report.fallback = report.fallback.or_else(|| notes.get(&spec.label).cloned());
        report.seconds = start.elapsed().as_secs_f64();
        let bias = self.origin.bias(spec)?.map(|mut values| {
            values.resize(spec.out_features.next_multiple_of(PADDING), 0.0);
            half(vec![values.len()], &values)
        });
        self.store.put(&report, &named(&report.key, packed.parts, bias))?;
        (self.events)(Event::Matrix(report));
        Ok(())
    }

    /// The matrix of `spec` in fp16, under the names of a layer that is not quantized.
    fn keep(&self, spec: &LinearSpec, start: Instant) -> Result<()> {
        let key = self.origin.output_key(spec);
        let mut tensors = vec![self.origin.half_matrix(spec)?];
        if let Some(bias) = self.origin.bias(spec)? {
            tensors.push((format!("{key}.bias"), half(vec![bias.len()], &bias)));
        }
        let shape = [spec.out_features, spec.in_features];
        let mut report = TensorReport::kept(&key, shape);
        report.seconds = start.elapsed().as_secs_f64();
        self.store.put(&report, &tensors)?;
        (self.events)(Event::Matrix(report));
        Ok(())
    }

    /// All tensors of block `layer` as the output has them.
    fn block_tensors(&self, layer: usize) -> Result<Vec<Named>> {
        let (ours, theirs) = (&self.origin.spec.blocks[layer], &self.origin.output.blocks[layer]);
        let mut tensors = self.origin.plain_tensors(ours, theirs)?;
        for target in self.plan.targets_of(layer) {
            tensors.extend(self.store.get(&self.origin.output_key(&target.spec))?.1);
        }
        Ok(tensors)
    }

    /// Whether `target` is stored as the embedding.
    fn is_table(&self, target: &Target) -> bool {
        self.options.tied && target.is_head()
    }

    /// Every module of the output in the order of the model.
    fn modules(&self) -> Result<Vec<Module>> {
        let mut modules: Vec<Module> = Vec::new();
        let plain = |modules: &mut Vec<Module>, tensors: Vec<Named>| {
            for (name, tensor) in tensors {
                // A router and its correction bias are one module.
                let parts = [".weight", ".e_score_correction_bias"];
                let key = parts.iter().find_map(|part| name.strip_suffix(part)).unwrap_or(&name);
                match modules.last_mut().filter(|m| m.0 == key) {
                    Some(module) => module.1.push((name, tensor)),
                    None => modules.push((key.to_owned(), vec![(name, tensor)])),
                }
            }
        };
        let table = self.origin.output_key(&self.origin.embedding_spec());
        match self.options.tied {
            true => {
                let head = self.origin.output_key(&self.origin.output.head.linear);
                let tensors = self.store.get(&head)?.1.into_iter();
                let renamed = |(name, t): Named| (name.replacen(&head, &table, 1), t);
                let tensors = tensors.map(renamed).collect();
                modules.push((table, tensors));
            }
            false => modules.push((table, self.embedding()?)),
        }
        let packed = |modules: &mut Vec<Module>, target: &Target| -> Result<()> {
            let key = self.origin.output_key(&target.spec);
            let tensors = self.store.get(&key)?.1;
            modules.push((key, tensors));
            Ok(())
        };
        let (ours, theirs) = (&self.origin.spec, &self.origin.output);
        for layer in 0..self.plan.layers {
            plain(
                &mut modules,
                self.origin.plain_tensors(&ours.blocks[layer], &theirs.blocks[layer])?,
            );
            for target in self.plan.targets_of(layer) {
                packed(&mut modules, target)?;
            }
        }
        plain(&mut modules, vec![self.origin.norm(&ours.norm, &theirs.norm)?]);
        for target in self.plan.targets_of(self.plan.layers) {
            if !self.is_table(target) {
                packed(&mut modules, target)?;
            }
        }
        if let (true, Some(ours), Some(theirs)) = (self.origin.mtp, &ours.mtp, &theirs.mtp) {
            for (ours, theirs) in [
                (&ours.embedding_norm, &theirs.embedding_norm),
                (&ours.hidden_norm, &theirs.hidden_norm),
                (&ours.norm, &theirs.norm),
            ] {
                plain(&mut modules, vec![self.origin.norm(ours, theirs)?]);
            }
            plain(&mut modules, self.origin.plain_tensors(&ours.block, &theirs.block)?);
        }
        Ok(modules)
    }

    /// Writes the directory, reads it back, and removes the job's folder.
    fn finish(self, checkpoint: &Checkpoint) -> Result<JobReport> {
        (self.events)(Event::Writing);
        let output = &self.options.output;
        let modules = self.modules()?;
        output::clear(output)?;
        let file_bytes = output::write_tensors(output, &modules, output::SHARD_BYTES)?;
        let tensors = self.plan.targets.iter().map(|target| {
            let mut report = self.store.get(&self.origin.output_key(&target.spec))?.0;
            if self.is_table(target) {
                report.key.clone_from(&modules[0].0);
            }
            Ok(report)
        });
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        let report = JobReport::new(&self.plan, tensors, &modules, file_bytes);
        let quantization = self.quantization_config(&report);
        let storage = output::tensor_storage(&quantization, &modules);
        let write = |name: &str, value: &Value| {
            write_file(&output.join(name), format!("{value:#}\n").as_bytes())
        };
        write("quantization_config.json", &storage)?;
        if checkpoint.path.is_dir() {
            output::copy_sidecars(&checkpoint.path, output)?;
        } else {
            for name in [
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
                "generation_config.json",
            ] {
                if let Some(bytes) = checkpoint.sidecar(name) {
                    write_file(&output.join(name), bytes)?;
                }
            }
        }
        for (name, bytes) in &self.options.files {
            write_file(&output.join(name), bytes)?;
        }
        let mut config = self.origin.config.clone();
        config["tie_word_embeddings"] = json!(self.options.tied);
        if config.get("architectures").is_none()
            && let Some(class) = output::class_name(&self.origin.output.model_type)
        {
            config["architectures"] = json!([class]);
        }
        if self.origin.is_gguf() {
            // Libraries take the absence of a version for an old one and warn about its faults.
            config["transformers_version"] = json!("5.0.0");
        }
        if let Some(original) = config.get("quantization_config").cloned() {
            config["original_quantization_config"] = original;
        }
        config["quantization_config"] = quantization;
        (self.events)(Event::Verifying);
        // Last, and only when all else is right: a directory with a configuration is a finished model.
        let done = self.verify(output, &config, &modules).and_then(|()| {
            write("config.json", &config)?;
            Checkpoint::open(output)?;
            Ok(())
        });
        if let Err(fault) = done {
            output::clear(output)?;
            return Err(fault);
        }
        self.store.remove()?;
        Ok(report)
    }

    fn quantization_config(&self, report: &JobReport) -> Value {
        let head = (0..self.plan.groups.len()).find(|&g| self.plan.groups[g].role == Role::Head);
        let whole = |bits: f64| if bits.fract() == 0.0 { json!(bits as u64) } else { json!(bits) };
        let mut config = json!({
            "quant_method": "exl3",
            "version": concat!("marlin-", env!("CARGO_PKG_VERSION")),
            "bits": (report.bits * 100.0).round() / 100.0,
            "head_bits": head.map_or(json!(16), |g| whole(self.options.bits[g])),
            "calibration": {
                "rows": self.options.calibration.rows.len(),
                "cols": self.options.calibration.columns(),
            },
            "out_scales": "always",
            "codebook": self.quantizer.codebook.name(),
        });
        let ahead = self.plan.groups.iter().zip(&self.options.bits);
        let ahead: Vec<_> = ahead.filter(|(g, _)| g.role == Role::Prediction).collect();
        if !ahead.is_empty() {
            let weights: f64 = ahead.iter().map(|(g, _)| g.weights as f64).sum();
            let spent: f64 = ahead.iter().map(|(g, bits)| g.weights as f64 * **bits).sum();
            config["mtp_bits"] = whole((spent / weights * 100.0).round() / 100.0);
        }
        config
    }

    /// Reads the directory as any reader would that has `config`, and compares every byte with what was meant.
    fn verify(&self, output: &Path, config: &Value, modules: &[Module]) -> Result<()> {
        let container = Container::HuggingFace { config: config.clone(), generation_config: None };
        let tensors = output::read_tensors(output)?;
        let written =
            Checkpoint::from_parts(output.to_owned(), container, tensors, BTreeMap::new());
        let fault = |key: &str, reason: &str| ConvertError::Tensor {
            key: key.to_owned(),
            reason: format!(
                "{reason} after writing; the disk may be failing, run the command again"
            ),
        };
        for (name, tensor) in modules.iter().flat_map(|m| &m.1) {
            let found = written.get(name).ok_or_else(|| fault(name, "missing"))?;
            if found.data != *tensor.bytes() || found.shape != tensor.shape() {
                return Err(fault(name, "differs"));
            }
        }
        let spec = marlin_models::spec(&written)?;
        let source = marlin_models::Source::new(&written);
        let plan = Plan::new(&spec, self.origin.mtp);
        let labels: BTreeSet<&str> = plan.targets.iter().map(|t| t.spec.key.as_str()).collect();
        if labels.len() != self.plan.targets.len() {
            return Err(fault("config.json", "another model"));
        }
        for target in plan.targets.iter().filter(|t| !self.is_table(t)) {
            source.linear(&target.spec)?;
        }
        Ok(())
    }
}
