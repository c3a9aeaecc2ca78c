//! Rotary embedding settings of a configuration, old layout (`rope_theta`, `rope_scaling`) and new
//! (`rope_parameters`), resolved to frequencies. Formulas: the papers of each scheme and
//! transformers 5.23 `modeling_rope_utils`, against which the tiny checkpoints are compared.

use crate::config::Config;
use crate::error::ModelError;
use crate::spec::RopeSpec;
use marlin_tensor::{LongRope, Rope, RopeStyle};
use std::f64::consts::PI;

type Result<T> = std::result::Result<T, ModelError>;

/// What an architecture knows about its rotary embedding beyond the configuration.
#[derive(Debug, Clone, Copy)]
pub struct RopeDefaults {
    /// Columns of a head that could rotate (before `partial_rotary_factor`).
    pub head_dim: usize,
    /// Pairing.
    pub style: RopeStyle,
    /// `max_position_embeddings`.
    pub max_position: usize,
}

/// Rotary settings after the old and new layouts have been told apart.
pub struct RopeConfig {
    kind: String,
    theta: f64,
    partial: f64,
    /// The object that holds the scheme's own fields; `None` for the default scheme.
    fields: Option<Config>,
    field: &'static str,
}

impl RopeConfig {
    /// Reads the settings of layer kind `layer_type` (`"full_attention"`, … for models that
    /// rotate differently by layer; `None` otherwise).
    ///
    /// # Errors
    /// When a field has the wrong type.
    pub fn read(config: &Config, layer_type: Option<&str>, theta: f64) -> Result<Self> {
        let mut field = "rope_parameters";
        let mut fields = config.object(field)?;
        if let (Some(kind), Some(outer)) = (layer_type, &fields)
            && outer.get(kind).is_some()
        {
            fields = outer.object(kind)?;
        }
        if fields.is_none() {
            field = "rope_scaling";
            fields = config.object(field)?;
        }
        let (mut kind, mut inner_theta, mut partial) = (None, None, None);
        if let Some(f) = &fields {
            let older = f.opt_str("type")?;
            kind = f.opt_str("rope_type")?.or(older).map(str::to_owned);
            inner_theta = f.opt_f64("rope_theta")?;
            partial = f.opt_f64("partial_rotary_factor")?;
        }
        // Some files repeat at the top what stands inside.
        let repeated = ["original_max_position_embeddings", "partial_rotary_factor", "rope_theta"];
        config.no_effect(&repeated);
        let theta = match inner_theta {
            Some(t) => t,
            None => config.f64_or("rope_theta", theta)?,
        };
        if !(theta > 0.0 && theta < 1e15) {
            return Err(config.error("rope_theta", format!("{theta} is not a positive number")));
        }
        let partial = match partial {
            Some(p) => p,
            None => config.opt_f64("partial_rotary_factor")?.unwrap_or(1.0),
        };
        if !(partial > 0.0 && partial <= 1.0) {
            return Err(
                config.error("partial_rotary_factor", format!("{partial} is not in (0, 1]"))
            );
        }
        let kind = kind.unwrap_or_else(|| "default".into());
        Ok(Self { kind, theta, partial, fields, field })
    }

    /// The same settings without any scaling (Gemma's local layers in the old layout).
    pub fn unscaled(theta: f64) -> Self {
        Self { kind: "default".into(), theta, partial: 1.0, fields: None, field: "rope_scaling" }
    }

    /// YaRN's correction of the softmax scale for latent attention: `m(mscale_all_dim)²`.
    ///
    /// # Errors
    /// When a field has the wrong type.
    pub fn mla_scale_correction(&self) -> Result<f32> {
        let Some(f) = self.fields.as_ref().filter(|_| self.kind != "default") else {
            return Ok(1.0);
        };
        let (factor, all) = (f.opt_f64("factor")?, f.opt_f64("mscale_all_dim")?.unwrap_or(0.0));
        let m = if all == 0.0 { 1.0 } else { yarn_mscale(factor.unwrap_or(1.0), all) };
        Ok((m * m) as f32)
    }

    /// Frequencies for heads of `defaults.head_dim` columns.
    ///
    /// # Errors
    /// When the scheme is unknown or its fields are missing or invalid.
    pub fn resolve(&self, config: &Config, defaults: &RopeDefaults) -> Result<RopeSpec> {
        // GGUF states the columns themselves.
        let rotary_dim = match config.opt_dim("rotary_dim")?.filter(|_| config.is_gguf()) {
            Some(n) => n.min(defaults.head_dim),
            None => (defaults.head_dim as f64 * self.partial) as usize,
        };
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            let reason = format!("{rotary_dim} rotary columns; an even number is needed");
            return Err(config.error("partial_rotary_factor", reason));
        }
        let base: Vec<f64> = (0..rotary_dim / 2)
            .map(|i| self.theta.powf(-(2.0 * i as f64) / rotary_dim as f64))
            .collect();
        let mut rope =
            Rope { style: defaults.style, inv_freq: Vec::new(), magnitude: 1.0, long: None };
        let absent = || config.error(self.field, "missing, but the rope type needs it");
        let fields = || self.fields.as_ref().ok_or_else(absent);
        match self.kind.as_str() {
            "default" => rope.inv_freq = to_f32(&base),
            "linear" => {
                let factor = positive(fields()?, "factor")?;
                rope.inv_freq = base.iter().map(|f| (f / factor) as f32).collect();
            }
            "llama3" => rope.inv_freq = to_f32(&llama3(&base, fields()?)?),
            "yarn" => {
                let (freq, magnitude) = yarn(&base, self.theta, fields()?, defaults.max_position)?;
                rope.inv_freq = to_f32(&freq);
                rope.magnitude = magnitude as f32;
            }
            "longrope" if config.is_gguf() => {
                return longrope_gguf(rope, &base, fields()?);
            }
            "longrope" | "su" => longrope(&mut rope, &base, fields()?, config, defaults)?,
            other => {
                let accepted = ["default", "linear", "llama3", "yarn", "longrope"];
                let field = format!("{}.rope_type", self.field);
                return Err(config.unsupported(&field, other, &accepted));
            }
        }
        Ok(RopeSpec { rope, divisors: None, long_divisors: None })
    }
}

fn to_f32(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

fn positive(fields: &Config, name: &str) -> Result<f64> {
    match fields.opt_f64(name)? {
        Some(v) if v > 0.0 => Ok(v),
        Some(v) => Err(fields.error(name, format!("{v} is not positive"))),
        None => Err(fields.error(name, "required field is missing")),
    }
}

/// Llama 3: long wavelengths are stretched, short ones kept, those between blended.
fn llama3(base: &[f64], fields: &Config) -> Result<Vec<f64>> {
    let factor = positive(fields, "factor")?;
    let low = positive(fields, "low_freq_factor")?;
    let high = positive(fields, "high_freq_factor")?;
    let original = positive(fields, "original_max_position_embeddings")?;
    if high <= low {
        return Err(fields.error("high_freq_factor", "must be larger than low_freq_factor"));
    }
    let scale = |&f: &f64| {
        let wavelength = 2.0 * PI / f;
        if wavelength > original / low {
            f / factor
        } else if wavelength < original / high {
            f
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * f / factor + smooth * f
        }
    };
    Ok(base.iter().map(scale).collect())
}

/// YaRN's `m(a) = 0.1 a ln(factor) + 1`.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

/// YaRN: interpolate slow dimensions, keep fast ones, ramp between.
fn yarn(base: &[f64], theta: f64, fields: &Config, max_position: usize) -> Result<(Vec<f64>, f64)> {
    let original = match fields.opt_dim("original_max_position_embeddings")? {
        Some(n) => n as f64,
        None => max_position as f64,
    };
    let factor = match fields.opt_f64("factor")? {
        Some(f) if f > 0.0 => f,
        Some(f) => return Err(fields.error("factor", format!("{f} is not positive"))),
        None => max_position as f64 / original,
    };
    let dim = base.len() as f64 * 2.0;
    let beta_fast = fields.opt_f64("beta_fast")?.unwrap_or(32.0);
    let beta_slow = fields.opt_f64("beta_slow")?.unwrap_or(1.0);
    if beta_fast <= 0.0 || beta_slow <= 0.0 {
        return Err(fields.error("beta_fast", "beta_fast and beta_slow must be positive"));
    }
    let correction =
        |rotations: f64| dim * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
    if fields.bool_or("truncate", true)? {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, high) = (low.max(0.0), high.min(dim - 1.0));
    let width = if high == low { 0.001 } else { high - low };
    let blend = |(i, f): (usize, &f64)| {
        let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
        f / factor * ramp + f * (1.0 - ramp)
    };
    let magnitude = match fields.opt_f64("attention_factor")? {
        Some(a) => a,
        None => {
            let mscale = fields.opt_f64("mscale")?.unwrap_or(0.0);
            let all = fields.opt_f64("mscale_all_dim")?.unwrap_or(0.0);
            if mscale != 0.0 && all != 0.0 {
                yarn_mscale(factor, mscale) / yarn_mscale(factor, all)
            } else {
                yarn_mscale(factor, 1.0)
            }
        }
    };
    Ok((base.iter().enumerate().map(blend).collect(), magnitude))
}

/// LongRoPE: per-dimension divisors, one list for short sequences and one for long ones.
fn longrope(
    rope: &mut Rope,
    base: &[f64],
    fields: &Config,
    config: &Config,
    defaults: &RopeDefaults,
) -> Result<()> {
    let original = match fields.opt_dim("original_max_position_embeddings")? {
        Some(n) => n,
        None => config.dim("original_max_position_embeddings")?,
    };
    let factor = match config.opt_dim("original_max_position_embeddings")? {
        Some(_) => defaults.max_position as f64 / original as f64,
        None => match fields.opt_f64("factor")? {
            Some(f) => f,
            None => defaults.max_position as f64 / original as f64,
        },
    };
    let magnitude = match fields.opt_f64("attention_factor")? {
        Some(a) => a,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    let table = |name: &str| -> Result<Vec<f32>> {
        let divisors = fields
            .opt_numbers(name)?
            .ok_or_else(|| fields.error(name, "required field is missing"))?;
        if divisors.len() != base.len()
            || divisors.iter().any(|d| d.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater))
        {
            return Err(fields.error(name, format!("expected {} positive numbers", base.len())));
        }
        Ok(base.iter().zip(&divisors).map(|(f, d)| (f / d) as f32).collect())
    };
    rope.inv_freq = table("short_factor")?;
    rope.magnitude = magnitude as f32;
    rope.long = Some(LongRope {
        threshold: original as u32,
        inv_freq: table("long_factor")?,
        magnitude: magnitude as f32,
    });
    Ok(())
}

/// LongRoPE whose divisors are tensors: frequencies without them, and the tensors' names.
fn longrope_gguf(mut rope: Rope, base: &[f64], fields: &Config) -> Result<RopeSpec> {
    let [long, short] = crate::gguf::LONG_FACTORS;
    let magnitude = positive(fields, "attention_factor")? as f32;
    rope.inv_freq = to_f32(base);
    rope.magnitude = magnitude;
    rope.long = Some(LongRope {
        threshold: positive(fields, "original_max_position_embeddings")? as u32,
        inv_freq: to_f32(base),
        magnitude,
    });
    Ok(RopeSpec { rope, divisors: Some(short.into()), long_divisors: Some(long.into()) })
}
