//! The source of a conversion, seen as the Hugging Face directory that it becomes: names, layouts and
//! element types of the output, whatever container the source came in.
//!
//! GGUF files of the Llama family permute the rows of q and k, fold norm offsets into the weights and may
//! store `kv_b` in halves; all of that is undone here.

use crate::error::ConvertError;
use crate::exl3::panels::PANEL;
use crate::matrix::Matrix;
use crate::plan::Plan;
use bytes::Bytes;
use half::{bf16, f16};
use marlin_checkpoint::{Checkpoint, Container, Encoding, StoredTensor};
use marlin_models::{
    BlockSpec, FeedForwardSpec, GqaSpec, LinearSpec, MixerSpec, ModelSpec, NormSpec, Source,
};
use marlin_tensor::{DType, HostTensor, RopeStyle, Weight};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

type Result<T> = std::result::Result<T, ConvertError>;

/// A named tensor of the output.
pub type Named = (String, HostTensor);

/// Tensors of the source that are not in what is made of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct LeftOut {
    /// Their names, in order.
    pub tensors: Vec<String>,
    /// Bytes that the source stores them in.
    pub bytes: u64,
}

/// An opened source.
pub struct Origin<'a> {
    /// Names and matrices of the source.
    pub source: Source<'a>,
    /// The model as the source describes it: what runs on the source's weights.
    pub spec: ModelSpec,
    /// The model as the output's configuration describes it.
    pub output: ModelSpec,
    /// The output's `config.json`, before the quantizer adds to it.
    pub config: Value,
    /// Whether a multi-token-prediction layer is stored.
    pub mtp: bool,
    /// Whether plain tensors become bf16 instead of fp16.
    bf16: bool,
}

impl<'a> Origin<'a> {
    /// Reads the source's configuration and sees that the output can say the same.
    ///
    /// # Errors
    /// When the model is not supported, or its output configuration would mean another model.
    pub fn open(checkpoint: &'a Checkpoint) -> Result<Self> {
        let source = Source::new(checkpoint);
        let spec = marlin_models::spec(checkpoint)?;
        let config = marlin_models::config(checkpoint)?;
        for field in ["vision_config", "audio_config"] {
            if config.get(field).is_some_and(Value::is_object) {
                let reason = "the model reads more than text, and what is made would lose that; convert a \
                              text-only version of it";
                let key = format!("{}: {field}", checkpoint.path.display());
                return Err(ConvertError::Tensor { key, reason: reason.to_owned() });
            }
        }
        let output = marlin_models::spec(&view(&checkpoint.path, &config, Vec::new()))?;
        let mtp = spec.mtp.as_ref().is_some_and(|m| source.has(&m.projection.key));
        let plain_bf16 = |t: &StoredTensor| t.encoding == Encoding::Plain(DType::BF16);
        let bf16 = checkpoint.tensors().any(plain_bf16);
        let origin = Self { source, spec, output, config, mtp, bf16 };
        origin.check_ropes()?;
        Ok(origin)
    }

    /// Rotary frequencies that only tensors state cannot be said by a configuration.
    fn check_ropes(&self) -> Result<()> {
        for (ours, theirs) in self.spec.blocks.iter().zip(&self.output.blocks) {
            let (MixerSpec::Gqa(ours), MixerSpec::Gqa(theirs)) = (&ours.mixer, &theirs.mixer)
            else {
                continue;
            };
            let (Some(a), Some(b)) = (&ours.rope, &theirs.rope) else { continue };
            let same = a.rope.inv_freq == b.rope.inv_freq && a.rope.magnitude == b.rope.magnitude;
            let divided = [&a.divisors, &a.long_divisors]
                .into_iter()
                .flatten()
                .any(|key| self.source.checkpoint().get(key).is_some());
            if !same || divided {
                let reason = "the file states its rotary frequencies as a tensor, which config.json \
                              cannot say; convert from the original safetensors";
                return Err(ConvertError::Tensor {
                    key: "rope_freqs".to_owned(),
                    reason: reason.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Whether the source is a GGUF file.
    pub fn is_gguf(&self) -> bool {
        matches!(self.source.checkpoint().container, Container::Gguf { .. })
    }

    /// The name a matrix has in the output.
    pub fn output_key(&self, spec: &LinearSpec) -> String {
        match self.source.find(&spec.key) {
            Some(name) if !self.is_gguf() => name,
            _ => spec.key.clone(),
        }
    }

    /// The matrix of `spec`, `[out_features, in_features]`, rows in the output's order.
    ///
    /// # Errors
    /// When it is missing or does not decode.
    pub fn matrix(&self, spec: &LinearSpec) -> Result<Matrix> {
        self.rows(spec, 0..spec.out_features)
    }

    /// Rows `rows` of the matrix of `spec`, in the output's order.
    ///
    /// # Errors
    /// When it is missing or does not decode.
    pub fn rows(&self, spec: &LinearSpec, rows: Range<usize>) -> Result<Matrix> {
        let weight = self.weight(spec)?;
        let decode = |rows: Range<usize>| -> Result<Matrix> {
            let mut out = Matrix::zeros(rows.len(), spec.in_features);
            let format = marlin_quant::format(weight.format);
            format.decode_rows(&weight, rows, &mut out.data)?;
            Ok(out)
        };
        let Some(heads) = self.permuted_heads(&spec.key) else { return decode(rows) };
        // Rows move within their head.
        let d = spec.out_features / heads;
        let (first, last) = (rows.start / d * d, rows.end.div_ceil(d) * d);
        let whole = unpermute(&decode(first..last)?, (last - first) / d);
        Ok(whole.part(rows.start - first..rows.end - first))
    }

    /// The stored matrix of `spec`; the embedding for a head that has none of its own.
    fn weight(&self, spec: &LinearSpec) -> Result<Weight> {
        let head = &self.output.head;
        let tied = head.tied && spec.key == head.linear.key && !self.source.has(&spec.key);
        Ok(match tied {
            true => self.source.linear(&self.embedding_spec())?,
            false => self.source.linear(spec)?,
        })
    }

    /// Bytes that the source stores the matrix of `spec` in.
    ///
    /// # Errors
    /// When it is missing.
    pub fn stored_bytes(&self, spec: &LinearSpec) -> Result<u64> {
        Ok(self.weight(spec)?.parts.iter().map(|(_, t)| t.bytes().len() as u64).sum())
    }

    /// Stored tensors for which the output has no place: what is made says no word of them.
    ///
    /// # Errors
    /// When a tensor that is needed is missing.
    pub fn left_out(&self, plan: &Plan) -> Result<LeftOut> {
        for target in &plan.targets {
            self.weight(&target.spec)?;
            self.source.bias(&target.spec)?;
        }
        self.source.linear(&self.embedding_spec())?;
        let mtp = self.spec.mtp.as_ref().filter(|_| self.mtp);
        let ahead = mtp.into_iter().flat_map(|m| [&m.embedding_norm, &m.hidden_norm, &m.norm]);
        let blocks = || self.spec.blocks.iter().chain(mtp.map(|m| &m.block));
        let norms = blocks().flat_map(BlockSpec::norms).chain([&self.spec.norm]).chain(ahead);
        norms.map(|norm| Ok(self.source.norm(norm)?)).collect::<Result<Vec<_>>>()?;
        for block in blocks() {
            if let MixerSpec::Mla(mla) = &block.mixer {
                let (heads, rank) = (mla.num_heads, mla.kv_lora_rank);
                if let Some((k, v)) = self.source.split_kv_b(&mla.kv_b) {
                    self.source.matrix(&k, heads * rank, mla.qk_nope_head_dim)?;
                    self.source.matrix(&v, heads * mla.v_head_dim, rank)?;
                } else {
                    self.source.linear(&mla.kv_b)?;
                }
            }
            if let FeedForwardSpec::Moe(moe) = &block.feed_forward {
                self.source.linear(&moe.gate)?;
                if let Some(key) = &moe.correction_bias {
                    self.source.vector(key, moe.router.num_experts)?;
                }
            }
        }
        let names: BTreeSet<String> =
            self.source.unused(usize::MAX).into_iter().chain(self.source.elsewhere()).collect();
        let stored = names.iter().filter_map(|name| self.source.checkpoint().get(name));
        let bytes = stored.map(|t| t.data.len() as u64).sum();
        Ok(LeftOut { tensors: names.into_iter().collect(), bytes })
    }

    /// The bias of `spec`, in the output's order, if it has one.
    ///
    /// # Errors
    /// When it is declared but missing.
    pub fn bias(&self, spec: &LinearSpec) -> Result<Option<Vec<f32>>> {
        let Some(bias) = self.source.bias(spec)? else { return Ok(None) };
        let values = Matrix::new(spec.out_features, 1, bias.to_f32()?);
        Ok(Some(match self.permuted_heads(&spec.key) {
            Some(heads) => unpermute(&values, heads).data,
            None => values.data,
        }))
    }

    /// The embedding table as a matrix.
    pub fn embedding_spec(&self) -> LinearSpec {
        LinearSpec {
            key: self.output.embedding.key.clone(),
            out_features: self.output.vocab_size,
            in_features: self.output.hidden_size,
            bias: false,
            label: "embedding".to_owned(),
            fused: None,
        }
    }

    /// Heads of `key` when the source orders the rows of each for interleaved rotation and the
    /// output for rotation by halves.
    fn permuted_heads(&self, key: &str) -> Option<usize> {
        let style = |g: &GqaSpec| g.rope.as_ref().map(|r| r.rope.style);
        let turned = (Some(RopeStyle::Interleaved), Some(RopeStyle::HalfSplit));
        self.spec.blocks.iter().zip(&self.output.blocks).find_map(|(ours, theirs)| {
            let (MixerSpec::Gqa(a), MixerSpec::Gqa(b)) = (&ours.mixer, &theirs.mixer) else {
                return None;
            };
            if (style(a), style(b)) != turned {
                return None;
            }
            let heads = [(&b.q, b.params.num_heads), (&b.k, b.params.num_kv_heads)];
            heads.into_iter().find(|(l, _)| l.key == key).map(|(_, heads)| heads)
        })
    }

    /// Tensors of a block that are kept as they are, under the output's names: norms, routers,
    /// correction biases, `kv_b`.
    ///
    /// # Errors
    /// When one is missing.
    pub fn plain_tensors(&self, ours: &BlockSpec, theirs: &BlockSpec) -> Result<Vec<Named>> {
        let mut out = Vec::new();
        for (ours, theirs) in ours.norms().into_iter().zip(theirs.norms()) {
            out.push(self.norm(ours, theirs)?);
        }
        if let (MixerSpec::Mla(ours), MixerSpec::Mla(theirs)) = (&ours.mixer, &theirs.mixer) {
            let (heads, rank) = (theirs.num_heads, theirs.kv_lora_rank);
            let (nope, value) = (theirs.qk_nope_head_dim, theirs.v_head_dim);
            let matrix = match self.source.split_kv_b(&ours.kv_b) {
                None => self.matrix(&theirs.kv_b)?,
                Some((k, v)) => {
                    let load = |name: &str, rows, columns| {
                        let weight = self.source.matrix(name, rows, columns)?;
                        self.source.decode(name, &weight)
                    };
                    let keys = load(&k, heads * rank, nope)?;
                    let values = load(&v, heads * value, rank)?;
                    joined_kv_b(&keys, &values, heads, [rank, nope, value])
                }
            };
            out.push(self.half_weight(&theirs.kv_b, &matrix));
        }
        if let FeedForwardSpec::Moe(moe) = &theirs.feed_forward {
            out.push(self.half_weight(&moe.gate, &self.matrix(&moe.gate)?));
            if let Some(key) = &moe.correction_bias {
                let values = self.source.vector(key, moe.router.num_experts)?;
                out.push((self.name(key), HostTensor::from_f32(vec![values.len()], &values)));
            }
        }
        Ok(out)
    }

    /// All tensors of block `layer` in fp16, with those of the group `replaced` names in place of its own.
    ///
    /// # Errors
    /// When one is missing.
    pub fn source_tensors(
        &self,
        plan: &Plan,
        layer: usize,
        replaced: Option<(usize, Vec<Named>)>,
    ) -> Result<Vec<Named>> {
        let mut tensors =
            self.plain_tensors(&self.spec.blocks[layer], &self.output.blocks[layer])?;
        let group = replaced.as_ref().map(|r| r.0);
        for target in plan.targets_of(layer) {
            let spec = &target.spec;
            if Some(target.group) != group {
                tensors.push(self.half_weight(spec, &self.matrix(spec)?));
            }
            if let Some(bias) = self.bias(spec)? {
                let name = format!("{}.bias", self.output_key(spec));
                tensors.push((name, HostTensor::from_f32(vec![bias.len()], &bias)));
            }
        }
        tensors.extend(replaced.into_iter().flat_map(|r| r.1));
        Ok(tensors)
    }

    /// A matrix that is kept, in fp16.
    pub fn half_weight(&self, spec: &LinearSpec, matrix: &Matrix) -> Named {
        let name = format!("{}.weight", self.output_key(spec));
        (name, half(vec![matrix.rows, matrix.columns], &matrix.data))
    }

    /// The matrix of `spec` in fp16, read some rows at a time.
    ///
    /// # Errors
    /// When it is missing.
    pub fn half_matrix(&self, spec: &LinearSpec) -> Result<Named> {
        let (rows, columns) = (spec.out_features, spec.in_features);
        let mut bytes = Vec::with_capacity(rows * columns * 2);
        for first in (0..rows).step_by(PANEL) {
            let some = self.rows(spec, first..rows.min(first + PANEL))?;
            bytes.extend_from_slice(half(vec![some.data.len()], &some.data).bytes());
        }
        let name = format!("{}.weight", self.output_key(spec));
        Ok((name, HostTensor::new(DType::F16, vec![rows, columns], bytes.into())?))
    }

    /// A norm's weight without the offset that the output's model adds.
    ///
    /// # Errors
    /// When it is missing.
    pub fn norm(&self, ours: &NormSpec, theirs: &NormSpec) -> Result<Named> {
        let mut values = self.source.norm(ours)?;
        values.iter_mut().for_each(|v| *v -= theirs.offset);
        let name = self.name(&format!("{}.weight", theirs.key));
        Ok((name, self.plain(vec![theirs.size], &values)))
    }

    /// The output's name of a full parameter name.
    fn name(&self, key: &str) -> String {
        if self.is_gguf() { key.to_owned() } else { self.source.parameter_name(key) }
    }

    /// The embedding table as it is kept when it is not quantized: the source's own bytes where they are
    /// already of the type, otherwise converted some rows at a time.
    ///
    /// # Errors
    /// When it is missing.
    pub fn embedding(&self) -> Result<Named> {
        let spec = self.embedding_spec();
        let name = format!("{}.weight", self.output_key(&spec));
        let (rows, columns) = (spec.out_features, spec.in_features);
        let shape = vec![rows, columns];
        let dtype = if self.bf16 { DType::BF16 } else { DType::F16 };
        if let Some(bytes) = self.embedding_bytes(&spec, dtype)? {
            return Ok((name, HostTensor::new(dtype, shape, bytes)?));
        }
        let mut bytes = Vec::with_capacity(rows * columns * 2);
        for first in (0..rows).step_by(PANEL) {
            let some = self.rows(&spec, first..rows.min(first + PANEL))?;
            bytes.extend_from_slice(self.plain(vec![some.data.len()], &some.data).bytes());
        }
        Ok((name, HostTensor::new(dtype, shape, bytes.into())?))
    }

    /// The table's bytes in the source, if they are of `dtype`.
    fn embedding_bytes(&self, spec: &LinearSpec, dtype: DType) -> Result<Option<Bytes>> {
        let weight = self.source.linear(spec)?;
        Ok(match &weight.parts[..] {
            [(_, t)]
                if t.dtype() == dtype && t.shape() == [spec.out_features, spec.in_features] =>
            {
                Some(t.bytes().clone())
            }
            _ => None,
        })
    }

    /// Bytes that the embedding takes in memory when it is kept: none when the source's own are used.
    ///
    /// # Errors
    /// When it is missing.
    pub fn embedding_memory(&self) -> Result<u64> {
        let spec = self.embedding_spec();
        let dtype = if self.bf16 { DType::BF16 } else { DType::F16 };
        let own = self.embedding_bytes(&spec, dtype)?.is_some();
        Ok(if own { 0 } else { 2 * (spec.out_features * spec.in_features) as u64 })
    }

    /// In the element type of the output's unquantized tensors: bf16 if the source has any, else fp16.
    fn plain(&self, shape: Vec<usize>, values: &[f32]) -> HostTensor {
        if !self.bf16 {
            return half(shape, values);
        }
        let bytes: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        HostTensor::new(DType::BF16, shape, bytes.into()).expect("two bytes a value")
    }
}

/// Values of `shape` in fp16; those beyond its range are the largest it has.
pub fn half(shape: Vec<usize>, values: &[f32]) -> HostTensor {
    let max = f16::MAX.to_f32();
    let narrow = |v: f32| f16::from_f32(v.clamp(-max, max)).to_le_bytes();
    let bytes: Vec<u8> = values.iter().flat_map(|&v| narrow(v)).collect();
    HostTensor::new(DType::F16, shape, bytes.into()).expect("two bytes a value")
}

/// A checkpoint of `tensors` under `config`, in memory.
pub fn view(path: &Path, config: &Value, tensors: Vec<Named>) -> Checkpoint {
    let file: Arc<Path> = path.into();
    let tensors = tensors.into_iter().map(|(name, t)| StoredTensor {
        name,
        encoding: Encoding::Plain(t.dtype()),
        shape: t.shape().to_vec(),
        data: t.bytes().clone(),
        file: file.clone(),
    });
    let container = Container::HuggingFace { config: config.clone(), generation_config: None };
    Checkpoint::from_parts(path.to_owned(), container, tensors, BTreeMap::new())
}

/// Rows `(2j, 2j + 1)` of every head to `(j, j + d/2)`.
fn unpermute(m: &Matrix, heads: usize) -> Matrix {
    let d = m.rows / heads;
    let mut out = Matrix::zeros(m.rows, m.columns);
    for row in 0..m.rows {
        let (head, i) = (row / d, row % d);
        let to = head * d + i % 2 * (d / 2) + i / 2;
        out.row_mut(to).copy_from_slice(m.row(row));
    }
    out
}

/// `kv_b: [heads · (nope + value), rank]` from keys `[heads, rank, nope]` and values `[heads, value, rank]`.
fn joined_kv_b(
    keys: &[f32],
    values: &[f32],
    heads: usize,
    [rank, nope, value]: [usize; 3],
) -> Matrix {
    let mut data = Vec::with_capacity(heads * (nope + value) * rank);
    for head in 0..heads {
        let keys = &keys[head * rank * nope..][..rank * nope];
        for i in 0..nope {
            data.extend((0..rank).map(|j| keys[j * nope + i]));
        }
        data.extend_from_slice(&values[head * value * rank..][..value * rank]);
    }
    Matrix::new(heads * (nope + value), rank, data)
}
