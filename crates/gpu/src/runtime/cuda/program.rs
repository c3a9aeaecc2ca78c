//! From a kernel to what is launched: text, compiled by NVRTC to the machine code of the device.

use super::driver::{Device, Kernel, Said};
use super::kept::Key;
use crate::runtime::CUDA_KERNELS;
use crate::runtime::cpp::{failed, lower_cuda};
use cubecl_core::server::ServerError;
use cubecl_cpp::shared::CompilationOptions;
use cubecl_server::id::KernelId;
use cubecl_server::kernel::CubeKernel;
use cudarc::nvrtc::{result as nvrtc, sys};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;

/// Compute capability, times ten, from which on a device has instructions of its own (`sm_90a`).
const OF_ITS_OWN: u32 = 90;
/// Where the headers of CUDA are if nothing says so.
const HOMES: [&str; 2] = ["/usr/local/cuda", "/opt/cuda"];

/// Whether the compiler can be loaded.
pub(super) fn is_there() -> Said<()> {
    // SAFETY: it only looks for the library.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err("NVRTC (libnvrtc), which compiles kernels, is not found".to_owned())
}

/// Every kernel so far.
#[derive(Debug)]
pub(super) struct Programs {
    options: CompilationOptions,
    /// What NVRTC is told.
    arguments: Vec<String>,
    /// The same, and which NVRTC.
    compiler: String,
    known: HashMap<KernelId, Kernel>,
}

/// A program of NVRTC.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: nothing else destroys it.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

fn home() -> PathBuf {
    let said = CUDA_KERNELS.get().and_then(|kernels| kernels.toolkit.clone());
    let found = || HOMES.iter().map(PathBuf::from).find(|path| path.exists());
    said.or_else(found).unwrap_or_else(|| PathBuf::from("/usr"))
}

/// The machine code that is asked for: of the device's generation, or PTX for the newest below it that NVRTC knows.
fn target(generation: u32) -> String {
    let mut count = 0;
    // SAFETY: the list has as many places as the first call says.
    let known = unsafe {
        let counted = sys::nvrtcGetNumSupportedArchs(&mut count).result();
        let mut known = vec![0; count.max(0) as usize];
        let listed = sys::nvrtcGetSupportedArchs(known.as_mut_ptr()).result();
        counted.and(listed).map(|()| known).unwrap_or_default()
    };
    let own = if generation >= OF_ITS_OWN { "a" } else { "" };
    let is_below = |version: &i32| *version as u32 <= generation;
    match known.iter().copied().filter(is_below).max() {
        Some(version) if version as u32 != generation => format!("compute_{version}"),
        _ => format!("sm_{generation}{own}"),
    }
}

impl Programs {
    pub(super) fn new(generation: u32, options: CompilationOptions) -> Self {
        let include = home().join("include");
        let folder = |path: PathBuf| format!("--include-path={}", path.display());
        let arguments = vec![
            format!("--gpu-architecture={}", target(generation)),
            folder(include.clone()),
            folder(include.join("cccl")),
        ];
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both are there after the call.
        let _ = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
        let compiler = format!("{major}.{minor} {}", arguments[0]);
        Self { options, arguments, compiler, known: HashMap::new() }
    }

    /// The kernel on the device, made at its first use.
    pub(super) fn load(
        &mut self,
        device: &Device,
        kernel: &dyn CubeKernel,
    ) -> Result<Kernel, ServerError> {
        let id = kernel.id();
        if let Some(known) = self.known.get(&id) {
            return Ok(*known);
        }
        let text = lower_cuda(kernel, &self.options)?;
        let key = Key::of(&self.compiler, &text.source);
        let load = |code: &[u8]| device.load(code, &text.name, text.block, text.shared_bytes);
        // What cannot be loaded any more is compiled anew.
        let loaded = match key.find().and_then(|code| load(&code).ok()) {
            Some(loaded) => loaded,
            None => {
                let code = self.compile(&text.source).map_err(failed)?;
                let loaded =
                    load(&code).map_err(|said| failed(format!("{}: {said}", text.name)))?;
                key.keep(&code);
                loaded
            }
        };
        self.known.insert(id, loaded);
        Ok(loaded)
    }

    /// Machine code, or PTX and a zero.
    fn compile(&self, source: &str) -> Said<Vec<u8>> {
        let text = CString::new(source).map_err(|e| format!("a text with a zero: {e}"))?;
        let program = nvrtc::create_program(&text, None).map_err(|e| format!("NVRTC: {e}"))?;
        let program = Program(program);
        // SAFETY: the program is there until this returns, and arrays have the sizes that NVRTC says.
        unsafe {
            if let Err(error) = nvrtc::compile_program(program.0, &self.arguments) {
                let log = nvrtc::get_program_log(program.0).unwrap_or_default();
                let log: Vec<u8> = log.iter().map(|&c| c as u8).collect();
                let said = CStr::from_bytes_until_nul(&log).unwrap_or_default();
                return Err(format!("NVRTC: {error}: {}", said.to_string_lossy()));
            }
            if !self.arguments[0].contains("=sm_") {
                let ptx = nvrtc::get_ptx(program.0).map_err(|e| format!("NVRTC: {e}"))?;
                return Ok(ptx.iter().map(|&c| c as u8).collect());
            }
            let mut len = 0;
            sys::nvrtcGetCUBINSize(program.0, &mut len)
                .result()
                .map_err(|e| format!("NVRTC: {e}"))?;
            let mut code = vec![0u8; len];
            sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast::<c_char>())
                .result()
                .map_err(|e| format!("NVRTC: {e}"))?;
            Ok(code)
        }
    }
}
