//! What kernels are told of the emulated devices: what CubeCL's own runtimes tell them of an Apple GPU of the Metal 3 family, and of
//! an NVIDIA one of compute capability 8.0.

use super::Target;
use cubecl_common::profile::TimingMethod;
use cubecl_core::cmma::MatrixLayout;
use cubecl_core::ir::features::{AtomicUsage, Features, Plane, TypeUsage};
use cubecl_core::ir::{
    AddressType, ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, FloatKind,
    HardwareProperties, IntKind, MemoryDeviceProperties, MmaProperties, TargetProperties, Type,
    UIntKind,
};
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::manual::{contiguous_elements_cuda, supported_mma_combinations};
use cubecl_cpp::metal::arch::MetalArchitecture;
use cubecl_cpp::metal::supported_cmma_combinations_metal;
use cubecl_cpp::shared::{register_mma_features, register_wmma_features};

/// Bytes to which buffers are aligned.
pub(super) const ALIGNMENT: u64 = 256;

/// What CubeCL's runtimes say of a device.
pub(super) fn device(target: Target) -> DeviceProperties {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 30,
        max_shared_memory_size: match target {
            Target::Apple => 32 << 10,
            Target::Nvidia => 99 << 10,
        },
        max_cube_count: (u32::MAX, u32::MAX, u32::MAX),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 1024),
        num_streaming_multiprocessors: None,
        num_tensor_cores: None,
        min_tensor_cores_dim: None,
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: 4,
        cube_mma_reserved_shared_memory: 0,
    };
    let memory = MemoryDeviceProperties::new(1 << 32, ALIGNMENT).with_max_memory(1 << 34);
    let identity = DeviceIdentity {
        name: target.name().to_owned(),
        fingerprint: format!("{target:?}"),
        physical: None,
    };
    let mut properties = DeviceProperties::new(
        Features::default(),
        memory,
        hardware,
        TimingMethod::System,
        identity,
    );
    properties.register_address_type(AddressType::U32);
    properties.register_address_type(AddressType::U64);
    let types = [
        ElemType::UInt(UIntKind::U8),
        ElemType::UInt(UIntKind::U16),
        ElemType::UInt(UIntKind::U32),
        ElemType::UInt(UIntKind::U64),
        ElemType::Int(IntKind::I8),
        ElemType::Int(IntKind::I16),
        ElemType::Int(IntKind::I32),
        ElemType::Int(IntKind::I64),
        ElemType::Float(FloatKind::F16),
        ElemType::Float(FloatKind::BF16),
        ElemType::Float(FloatKind::F32),
        ElemType::Bool,
    ];
    for kind in types {
        properties.register_type_usage(kind, TypeUsage::all());
    }
    for kind in [ElemType::Int(IntKind::I32), ElemType::UInt(UIntKind::U32)] {
        properties.register_atomic_type_usage(Type::atomic(kind), AtomicUsage::all());
        properties.register_shared_atomic_type_usage(Type::atomic(kind), AtomicUsage::all());
    }
    properties.features.alignment = true;
    properties.features.device_memory_scope = true;
    for plane in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
        properties.features.plane.insert(plane);
    }
    match target {
        Target::Apple => {
            let matrices = supported_cmma_combinations_metal(&MetalArchitecture::Metal3);
            register_wmma_features(matrices, &mut properties);
        }
        Target::Nvidia => {
            // The oldest generation with all that our kernels use.
            let ampere = CudaArchitecture { version: 80, tensor_cores: true };
            register_mma_features(supported_mma_combinations(&ampere), &mut properties);
        }
    }
    properties
}

/// How matrices lie in the registers of a plane, where kernels of ours ask for it: on NVIDIA's GPUs.
pub(super) fn target(target: Target) -> TargetProperties {
    let mma = match target {
        Target::Apple => MmaProperties::default(),
        Target::Nvidia => MmaProperties {
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
    };
    TargetProperties { mma }
}
