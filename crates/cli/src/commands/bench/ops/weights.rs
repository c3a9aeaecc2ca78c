//! Random numbers, and random matrices of any format.

use marlin_checkpoint::GgmlType;
use marlin_quant::WeightFormat;
use marlin_quant::exl3::codebook::MUL1_MULTIPLIER;
use marlin_quant::exl3::ring::TILE_SIDE;
use marlin_tensor::{DType, HostTensor, TensorError, Weight};

/// Rows that are made; the others repeat them.
pub const BAND: usize = 128;
/// Bits per weight of EXL3 matrices.
pub const EXL3_BITS: usize = 3;
/// A half-precision number whose bytes are all below this is finite, wherever in a block it lies.
const FINITE: u64 = 0x3c;

/// A small generator: runs are alike.
pub struct Random(u64);

impl Random {
    /// From a fixed seed.
    pub fn new() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }

    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// -1 to 1.
    pub fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `n` values from -1 to 1.
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    fn bytes(&mut self, n: usize, below: u64) -> Vec<u8> {
        (0..n).map(|_| ((self.next() >> 32) % below) as u8).collect()
    }
}

/// A matrix of `format`: packed where the format has a packer, else random blocks with finite scales.
/// `None` where neither is possible. `out_features` is a multiple of [`BAND`], `in_features` of 256.
pub fn random(
    format: &dyn WeightFormat,
    out_features: usize,
    in_features: usize,
    random: &mut Random,
) -> Option<Weight> {
    if format.id() == "exl3" {
        return exl3(out_features, in_features, random).ok();
    }
    let values = random.floats(BAND * in_features);
    let band = match format.pack(&values, BAND, in_features) {
        Ok(band) => band,
        Err(_) => blocks(format.id(), in_features, random)?,
    };
    let parts = band.parts.iter().map(|(name, tensor)| {
        // What is said of the inputs is said once.
        let times = if tensor.shape() == [in_features] { 1 } else { out_features / BAND };
        let mut shape = tensor.shape().to_vec();
        *shape.first_mut()? *= times;
        let data = tensor.bytes().repeat(times);
        Some((*name, HostTensor::new(tensor.dtype(), shape, data.into()).ok()?))
    });
    Some(Weight { out_features, parts: parts.collect::<Option<_>>()?, ..band })
}

/// The same matrix in memory of its own.
pub fn copy(weight: &Weight) -> Result<Weight, TensorError> {
    let parts = weight.parts.iter().map(|(name, tensor)| {
        let data = tensor.bytes().to_vec().into();
        Ok((*name, HostTensor::new(tensor.dtype(), tensor.shape().to_vec(), data)?))
    });
    Ok(Weight { parts: parts.collect::<Result<_, TensorError>>()?, ..weight.clone() })
}

/// A band of ggml blocks, with a factor per row where the format has one.
fn blocks(id: &'static str, in_features: usize, random: &mut Random) -> Option<Weight> {
    let (base, scaled) = match id.strip_suffix("_scaled") {
        Some(base) => (base, true),
        None => (id, false),
    };
    let kind = GgmlType::all().find(|kind| kind.name().eq_ignore_ascii_case(base))?;
    let row_bytes = in_features / kind.block_elements() * kind.block_bytes();
    let data = random.bytes(BAND * row_bytes, FINITE);
    let tensor = HostTensor::new(DType::U8, vec![BAND, row_bytes], data.into()).ok()?;
    let mut parts = vec![("blocks", tensor)];
    if scaled {
        parts.push(("scale", HostTensor::from_f32(vec![BAND], &[1.0; BAND])));
    }
    Some(Weight { format: id, out_features: BAND, in_features, parts })
}

/// Any bits are a valid trellis.
fn exl3(
    out_features: usize,
    in_features: usize,
    random: &mut Random,
) -> Result<Weight, TensorError> {
    let shape = vec![in_features / TILE_SIDE, out_features / TILE_SIDE, TILE_SIDE * EXL3_BITS];
    let trellis = random.bytes(2 * shape.iter().product::<usize>(), 256);
    let ones = |n: usize| -> Result<HostTensor, TensorError> {
        const ONE: [u8; 2] = [0x00, 0x3c];
        HostTensor::new(DType::F16, vec![n], ONE.repeat(n).into())
    };
    let marker = MUL1_MULTIPLIER.to_le_bytes().to_vec();
    let parts = vec![
        ("trellis", HostTensor::new(DType::I16, shape, trellis.into())?),
        ("suh", ones(in_features)?),
        ("svh", ones(out_features)?),
        ("mul1", HostTensor::new(DType::I32, vec![], marker.into())?),
    ];
    Ok(Weight { format: "exl3", out_features, in_features, parts })
}
