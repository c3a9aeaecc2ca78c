//! What kernels are told of the emulated devices: what CubeCL's own runtime tells them of an Apple GPU of the Metal 3 family, and ours
//! of an NVIDIA one of compute capability 9.0.

use super::Target;
use crate::runtime::cpp::{self, ALIGNMENT, Nvidia};
use cubecl_common::profile::TimingMethod;
use cubecl_core::ir::features::{AtomicUsage, Features, Plane, TypeUsage};
use cubecl_core::ir::{
    AddressType, DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties,
    IntKind, MemoryDeviceProperties, TargetProperties, Type, UIntKind,
};
use cubecl_cpp::metal::arch::MetalArchitecture;
use cubecl_cpp::metal::supported_cmma_combinations_metal;
use cubecl_cpp::shared::register_wmma_features;

/// Bytes of an emulated device's memory.
const MEMORY: u64 = 1 << 34;

/// What CubeCL's runtimes, or ours, say of a device.
pub(super) fn device(target: Target) -> DeviceProperties {
    match target {
        Target::Apple => apple(),
        // The generation that our kernels use most of.
        Target::Nvidia => Nvidia {
            name: target.name().to_owned(),
            fingerprint: "ptx_sm90".to_owned(),
            generation: 90,
            memory_bytes: MEMORY,
            shared_bytes: 227 << 10,
            most_units: 1024,
            // More than small products have parts for: blocks of threads with nothing to do are met.
            multiprocessors: Some(24),
        }
        .properties(),
    }
}

fn apple() -> DeviceProperties {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 30,
        max_shared_memory_size: 32 << 10,
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
    let memory = MemoryDeviceProperties::new(MEMORY / 4, ALIGNMENT).with_max_memory(MEMORY);
    let identity = DeviceIdentity {
        name: Target::Apple.name().to_owned(),
        fingerprint: format!("{:?}", Target::Apple),
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
    let matrices = supported_cmma_combinations_metal(&MetalArchitecture::Metal3);
    register_wmma_features(matrices, &mut properties);
    properties
}

/// How matrices lie in the registers of a plane, where kernels of ours ask for it: on NVIDIA's GPUs.
pub(super) fn target(target: Target) -> TargetProperties {
    match target {
        Target::Apple => TargetProperties::default(),
        Target::Nvidia => cpp::matrices(),
    }
}
