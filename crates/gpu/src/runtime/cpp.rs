//! Kernels as text in a dialect of C++, and what they are told of an NVIDIA GPU.

use cubecl_common::profile::TimingMethod;
use cubecl_core::cmma::MatrixLayout;
use cubecl_core::ir::features::{Features, Plane};
use cubecl_core::ir::{
    ContiguousElements, DeviceIdentity, DeviceProperties, HardwareProperties,
    MemoryDeviceProperties, MmaProperties, TargetProperties,
};
use cubecl_core::server::{LaunchError, ServerError};
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::manual::{contiguous_elements_cuda, supported_mma_combinations};
use cubecl_cpp::shared::{
    CompilationOptions, ComputeKernel, CppCompiler, register_mma_features, register_supported_types,
};
use cubecl_cpp::target::{CppTarget, Cuda};
use cubecl_environment::backtrace::BackTrace;
use cubecl_server::compiler::{CompilationError, CompilationRecording, Compiler};
use cubecl_server::kernel::{CompiledKernel, CubeKernel};

/// How a kernel begins: it waits for what the launches before it wrote, and lets the next one start (`halves.cuh`).
const BEGIN: &str = "#if __CUDA_ARCH__ >= 900\nasm volatile(\"griddepcontrol.wait;\" ::: \"memory\");\n\
                     asm volatile(\"griddepcontrol.launch_dependents;\" ::: \"memory\");\n#endif\n";

/// A kernel as text.
pub(super) struct Text {
    pub(super) name: String,
    pub(super) source: String,
    /// Threads of a block.
    pub(super) block: [u32; 3],
    /// Bytes of shared memory that the text leaves to the launch.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "CUDA's alone"))]
    pub(super) shared_bytes: usize,
}

/// What a launch or a kernel failed of.
pub(super) fn failed(reason: impl Into<String>) -> ServerError {
    let (reason, backtrace) = (reason.into(), BackTrace::capture());
    ServerError::Launch(LaunchError::from(CompilationError::Generic { reason, backtrace }))
}

/// As CubeCL's runtimes ask.
pub(super) fn options() -> CompilationOptions {
    let mut options = CompilationOptions::default();
    options.supports_features.fast_math = true;
    options.supports_features.dp4a = true;
    options
}

/// The kernel in the dialect of `T`.
pub(super) fn lower<T: CppTarget>(
    kernel: &dyn CubeKernel,
    options: &CompilationOptions,
) -> Result<Text, ServerError>
where
    CppCompiler<T>:
        Compiler<CompilationOptions = CompilationOptions, Representation = ComputeKernel>,
{
    let mut recording = CompilationRecording::new(&kernel.id());
    let compiled = CompiledKernel::lower(kernel, &mut recording, |definition| {
        CompiledKernel::compile(kernel, definition, &mut CppCompiler::<T>::default(), options)
    })
    .map_err(|error| ServerError::Launch(LaunchError::from(error)))?;
    Ok(Text {
        name: compiled.entrypoint_name,
        source: compiled.source,
        block: [compiled.cube_dim.x, compiled.cube_dim.y, compiled.cube_dim.z],
        shared_bytes: compiled.repr.map_or(0, |kernel| kernel.shared_memory_size),
    })
}

/// The kernel for an NVIDIA GPU. One that is written by hand begins as it says itself.
pub(super) fn lower_cuda(
    kernel: &dyn CubeKernel,
    options: &CompilationOptions,
) -> Result<Text, ServerError> {
    let mut text = lower::<Cuda>(kernel, options)?;
    if kernel.source().is_none() {
        let body = text.source.find("__global__").and_then(|at| {
            const OPEN: &str = ") {\n";
            Some(at + text.source[at..].find(OPEN)? + OPEN.len())
        });
        let body = body.ok_or_else(|| failed(format!("{}: a text without a kernel", text.name)))?;
        text.source.insert_str(body, BEGIN);
    }
    Ok(text)
}

/// What tells one NVIDIA GPU from another.
pub(super) struct Nvidia {
    pub(super) name: String,
    /// What kernels are compiled to.
    pub(super) fingerprint: String,
    /// Ten times the compute capability.
    pub(super) generation: u32,
    pub(super) memory_bytes: u64,
    pub(super) shared_bytes: usize,
    pub(super) most_units: u32,
    pub(super) multiprocessors: Option<u32>,
}

/// Bytes to which arrays are aligned.
pub(super) const ALIGNMENT: u64 = 256;

impl Nvidia {
    /// What kernels are told of it.
    pub(super) fn properties(self) -> DeviceProperties {
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: self.shared_bytes,
            max_cube_count: (i32::MAX as u32, u16::MAX.into(), u16::MAX.into()),
            max_units_per_cube: self.most_units,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: self.multiprocessors,
            num_tensor_cores: None,
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: 4,
            cube_mma_reserved_shared_memory: 0,
        };
        let memory = MemoryDeviceProperties::new(self.memory_bytes / 4, ALIGNMENT)
            .with_max_memory(self.memory_bytes);
        let identity =
            DeviceIdentity { name: self.name, fingerprint: self.fingerprint, physical: None };
        let mut properties = DeviceProperties::new(
            Features::default(),
            memory,
            hardware,
            TimingMethod::System,
            identity,
        );
        register_supported_types(&mut properties);
        properties.features.alignment = true;
        properties.features.memory_reinterpret = true;
        properties.features.device_memory_scope = true;
        for plane in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
            properties.features.plane.insert(plane);
        }
        let generation = CudaArchitecture { version: self.generation, tensor_cores: true };
        register_mma_features(supported_mma_combinations(&generation), &mut properties);
        properties
    }
}

/// How matrices lie in the registers of a plane of an NVIDIA GPU.
pub(super) fn matrices() -> TargetProperties {
    TargetProperties {
        mma: MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: MatrixLayout::RowMajor,
            register_layout_b: MatrixLayout::ColMajor,
            register_layout_acc: MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        },
    }
}
