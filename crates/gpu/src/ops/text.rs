//! Kernels written by hand in CUDA C++, for the few products whose instructions have to be chosen one by one. Each has a
//! portable twin in CubeCL, which every other runtime uses.

use crate::gpu::{Buffer, Gpu};
use cubecl::CubeKernel;
use cubecl::PrecompiledSource;
use cubecl::ir::metadata::Info;
use cubecl::ir::settings::Dim3;
use cubecl::ir::{AddressType, ElemType, UIntKind};
use cubecl::prelude::*;
use cubecl::server::{KernelArguments, MetadataBindingInfo};
use marlin_tensor::Activation;
use std::fmt::Debug;
use std::hash::Hash;

/// Rows of inputs of a product, which its kernel may make of those of a gate.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) x: &'a Buffer,
    /// `activation(x) * up` is multiplied, and not `x`.
    pub(crate) gate: Option<(Activation, &'a Buffer)>,
}

impl<'a> Inputs<'a> {
    /// The other factor, or what stands for an array that is not read.
    pub(crate) fn up(self, gpu: &'a Gpu) -> &'a Buffer {
        self.gate.map_or(&gpu.none, |(_, up)| up)
    }

    /// `ACTIVATION` of `halves.cuh`.
    pub(crate) fn activation(self) -> u32 {
        match self.gate.map(|(activation, _)| activation) {
            None => 0,
            Some(Activation::Silu) => 1,
            Some(Activation::GeluTanh) => 2,
            Some(Activation::Gelu) => 3,
        }
    }
}

impl<'a> From<&'a Buffer> for Inputs<'a> {
    fn from(x: &'a Buffer) -> Self {
        Self { x, gate: None }
    }
}

/// What a text is compiled with; all texts of one file and the same values are one kernel.
pub(crate) trait Defines: Clone + Debug + Eq + Hash + Send + Sync + 'static {
    /// The file.
    const TEXT: &str;
    /// What tells its versions apart.
    const HASH: u64 = fnv1a(FNV1A, Self::TEXT.as_bytes());

    /// Names and values of its macros.
    fn defines(&self) -> Vec<(&'static str, String)>;
}

/// One function of a text.
#[derive(Clone)]
pub(crate) struct Text<D> {
    pub(crate) function: &'static str,
    /// Threads of a block.
    pub(crate) threads: u32,
    pub(crate) defines: D,
}

impl<D: Defines> Text<D> {
    /// Launches `blocks` blocks with the arrays in the order of the function's parameters, and `word` as its last.
    pub(crate) fn launch(self, gpu: &Gpu, blocks: (u32, u32), arrays: &[&Buffer], word: u64) {
        let mut arguments = KernelArguments::new();
        for array in arrays {
            arguments = arguments.with_buffer(array.handle.clone().binding());
        }
        // All of it is passed by value: nothing is dynamic.
        arguments.info = MetadataBindingInfo::new(vec![word], 1);
        let count = CubeCount::Static(blocks.0, blocks.1, 1);
        gpu.client.launch(Box::new(self), count, arguments);
    }
}

/// Where FNV-1a begins.
pub(crate) const FNV1A: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a of bytes that follow others, whose hash is `hash`.
pub(crate) const fn fnv1a(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    hash
}

impl<D: Defines> KernelMetadata for Text<D> {
    fn id(&self) -> KernelId {
        let threads = Dim3::new_1d(self.threads);
        KernelId::new::<Self>().cube_dim(threads).info((
            D::HASH,
            self.function,
            self.defines.clone(),
        ))
    }

    fn address_type(&self) -> ElemType {
        ElemType::UInt(UIntKind::U32)
    }
}

impl<D: Defines> CubeKernel for Text<D> {
    fn define(&self) -> KernelDefinition {
        let threads = Dim3::new_1d(self.threads);
        let settings = KernelSettings::new(threads, ExecutionMode::Unchecked, AddressType::U32);
        let body = cubecl::ir::Scope::root(settings.clone());
        KernelDefinition { body, settings, info: Info::default() }
    }

    fn source(&self) -> Option<PrecompiledSource> {
        let defines = self.defines.defines().into_iter();
        let defines: String = defines.map(|(name, v)| format!("#define {name} {v}\n")).collect();
        Some(PrecompiledSource {
            source: defines + D::TEXT,
            entrypoint_name: self.function.to_owned(),
            lang: "cuda",
        })
    }
}
