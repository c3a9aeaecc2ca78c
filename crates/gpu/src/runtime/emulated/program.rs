//! Kernels as Metal text, and the text as code of this machine.

use super::Target;
use crate::runtime::Emulation;
use crate::runtime::cpp::{Text, failed, lower, lower_cuda, options};
use cubecl_core::server::ServerError;
use cubecl_cpp::target::Metal;
use cubecl_server::id::KernelId;
use cubecl_server::kernel::CubeKernel;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// In place of Apple's headers and of NVIDIA's compiler.
const HEADERS: [(&str, &str); 4] = [
    ("fibers", include_str!("fibers")),
    ("cuda", include_str!("cuda")),
    ("metal_stdlib", include_str!("metal_stdlib")),
    ("metal_simdgroup_matrix", include_str!("metal_simdgroup_matrix")),
];
/// Instructions in texts in CUDA C++, and what there is of `cuda` in their place.
const INSTRUCTIONS: [(&str, &str); 2] = [
    (include_str!("../../ops/ptx.cuh"), ""),
    (
        include_str!("../../ops/gemm/warpgroups.cuh"),
        "#define multiply_add_all shim::multiply_columns<N, LINE, BRAIN>\n",
    ),
];
/// What runs a kernel; null, or what went wrong.
type Entry = unsafe extern "C" fn(*const *mut u8, u32, *const u32, *const u32) -> *const c_char;

/// A kernel that can be run.
pub(super) struct Program {
    entry: Entry,
    cube: [u32; 3],
    name: String,
    /// What `entry` lies in, never closed: fibers' stacks may live in it.
    _library: *mut c_void,
}

// SAFETY: a handle of a library that is never closed, and a function of it that keeps what it has to threads.
unsafe impl Send for Program {}
// SAFETY: as above.
unsafe impl Sync for Program {}

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: i32) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

impl Program {
    /// Runs all threadgroups, one after the other.
    pub(super) fn run(&self, buffers: &[*mut u8], groups: [u32; 3]) -> Result<(), ServerError> {
        // SAFETY: the buffers are those of the launch that the text was made for.
        let error = unsafe {
            let count = buffers.len() as u32;
            (self.entry)(buffers.as_ptr(), count, groups.as_ptr(), self.cube.as_ptr())
        };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: a string that the library keeps.
        let said = unsafe { CStr::from_ptr(error) }.to_string_lossy();
        Err(failed(format!("{}: {said}", self.name)))
    }
}

/// Every kernel so far.
pub(super) struct Programs {
    target: Target,
    emulation: Emulation,
    known: HashMap<KernelId, Option<Arc<Program>>>,
}

impl Programs {
    pub(super) fn new(target: Target, mut emulation: Emulation) -> Self {
        emulation.folder.push(format!("{target:?}").to_lowercase());
        Self { target, emulation, known: HashMap::new() }
    }

    /// The kernel as code, made at its first use; `None` for one of CubeCL's that only an NVIDIA GPU can run.
    pub(super) fn load(
        &mut self,
        kernel: &dyn CubeKernel,
    ) -> Result<Option<Arc<Program>>, ServerError> {
        let id = kernel.id();
        if let Some(program) = self.known.get(&id) {
            return Ok(program.clone());
        }
        let program = match (self.target, kernel.source().is_some()) {
            (Target::Nvidia, true) => {
                let text = lower_cuda(kernel, &options())?;
                Some(self.build(&text, "cu", &translate_cuda(&text)))
            }
            (Target::Nvidia, false) if !self.is_portable(kernel)? => None,
            _ => {
                let text = lower::<Metal>(kernel, &options())?;
                let code = translate(&text.name, &text.source);
                Some(code.and_then(|code| self.build(&text, "metal", &code)))
            }
        };
        let program = program.transpose().map_err(failed)?.map(Arc::new);
        self.known.insert(id, program.clone());
        Ok(program)
    }

    /// Leaves the kernel's CUDA text where it stands for an NVIDIA GPU; whether it is without that maker's instructions, so that it can be run as Metal's.
    fn is_portable(&self, kernel: &dyn CubeKernel) -> Result<bool, ServerError> {
        let Text { name, source: text, .. } = lower_cuda(kernel, &options())?;
        let file = self.emulation.folder.join(format!("{name}-{}.cu", self.known.len()));
        std::fs::create_dir_all(&self.emulation.folder)
            .and_then(|()| std::fs::write(&file, &text))
            .map_err(|error| failed(format!("{}: {error}", file.display())))?;
        // Atomic additions are written so too, and Metal's are run; there no launch starts before its time.
        let others =
            |line: &str| ["atom.", "griddepcontrol."].iter().any(|known| line.contains(known));
        Ok(!text.lines().any(|line| line.contains("asm") && !others(line)))
    }

    /// A text, of a `kind`, as `code` in C++.
    fn build(&self, text: &Text, kind: &str, code: &str) -> Result<Program, String> {
        let Emulation { folder, compiler } = &self.emulation;
        let name = &text.name;
        let file = |kind: &str| folder.join(format!("{name}-{}.{kind}", self.known.len()));
        let failed = |what: &Path| {
            let what = what.display().to_string();
            move |error: std::io::Error| format!("{what}: {error}")
        };
        std::fs::create_dir_all(folder).map_err(failed(folder))?;
        for (name, content) in HEADERS {
            let path = folder.join(name);
            write_once(&path, content).map_err(failed(&path))?;
        }
        // Those in CUDA C++ are compiled for an NVIDIA GPU where they lie.
        let left = (kind == "metal").then(|| (file(kind), text.source.as_str()));
        for (path, content) in left.iter().chain(&[(file("cpp"), code)]) {
            std::fs::write(path, content).map_err(failed(path))?;
        }
        // Parsing the headers is most of the time that a kernel takes: compilers that look for it find them parsed.
        let header = folder.join(if kind == "metal" { "metal_stdlib" } else { "cuda" });
        let parsed = header.with_extension("gch");
        if HEADERS.iter().any(|(name, _)| is_newer(&folder.join(name), &parsed)) {
            let new = unique(&parsed);
            compile(compiler, folder, &["-x", "c++-header"], &header, &new)?;
            std::fs::rename(new, &parsed).map_err(failed(&parsed))?;
        }
        let library = file("so");
        compile(compiler, folder, &["-shared"], &file("cpp"), &library)?;
        open(&library, name, text.block)
    }
}

fn compile(
    compiler: &str,
    folder: &Path,
    what: &[&str],
    from: &Path,
    to: &Path,
) -> Result<(), String> {
    let mut command = Command::new(compiler);
    command.args(["-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-w", "-fPIC"]);
    command.args(what).arg("-I").arg(folder).arg("-o").arg(to).arg(from);
    let done = command.output().map_err(|error| format!("{compiler}: {error}"))?;
    match done.status.success() {
        true => Ok(()),
        false => Err(format!("{}: {}", from.display(), String::from_utf8_lossy(&done.stderr))),
    }
}

/// Whether `from` was written after `made`, or that is not there.
fn is_newer(from: &Path, made: &Path) -> bool {
    let time = |path: &Path| path.metadata().and_then(|about| about.modified()).ok();
    time(made).is_none_or(|made| time(from).is_none_or(|from| from > made))
}

/// A name beside `path` that nobody else has.
fn unique(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_extension(format!("{}-{number}", std::process::id()))
}

/// Writes what others may be reading, or writing too.
fn write_once(path: &Path, content: &str) -> std::io::Result<()> {
    if std::fs::read(path).is_ok_and(|there| there == content.as_bytes()) {
        return Ok(());
    }
    let new = unique(path);
    std::fs::write(&new, content)?;
    std::fs::rename(new, path)
}

fn open(library: &Path, name: &str, cube: [u32; 3]) -> Result<Program, String> {
    const NOW: i32 = 2;
    let path = format!("{}\0", library.display());
    // SAFETY: strings end with a zero byte; the symbol is of the type that `translate` writes.
    unsafe {
        let handle = dlopen(path.as_ptr().cast(), NOW);
        let entry = match handle.is_null() {
            true => std::ptr::null_mut(),
            false => dlsym(handle, c"marlin_run".as_ptr()),
        };
        if entry.is_null() {
            return Err(CStr::from_ptr(dlerror()).to_string_lossy().into_owned());
        }
        let entry = std::mem::transmute::<*mut c_void, Entry>(entry);
        Ok(Program { entry, cube, name: name.to_owned(), _library: handle })
    }
}

/// The text as C++: shared memory is static, and a function calls the kernel for one thread.
fn translate(name: &str, text: &str) -> Result<String, String> {
    let unreadable = || format!("{name}: the text declares no kernel of that name");
    let text = text
        .replace(") threadgroup char ", ") static char ")
        .replace("\nconstant info_st& ", "\nconst info_st& ");
    let begin = text.find(&format!(" {name}(")).ok_or_else(unreadable)? + name.len() + 2;
    let parameters = &text[begin..begin + text[begin..].find(") {").ok_or_else(unreadable)?];
    let mut arguments = Vec::new();
    for parameter in parameters.split(", ").filter(|p| !p.trim().is_empty()) {
        let (declared, attribute) = parameter.split_once(" [[").unwrap_or((parameter, ""));
        let (kind, _) =
            declared.rsplit_once(" const ").ok_or_else(|| format!("{name}: {parameter}"))?;
        let attribute = attribute.trim_end_matches("]]");
        arguments.push(match attribute.strip_prefix("buffer(") {
            Some(index) => format!("({kind})shim::buffers[{}]", index.trim_end_matches(')')),
            // The numbers of a launch: Metal gives them the first free place, the last.
            None if attribute.is_empty() => format!("({kind})shim::buffers[shim::last]"),
            None => format!("shim::{attribute}()"),
        });
    }
    Ok(format!("{text}\n{}\n", entry(&format!("{name}({});", arguments.join(", ")))))
}

/// The text, after what stands for the compiler and the GPU, and a function that calls the kernel for one thread.
fn translate_cuda(text: &Text) -> String {
    let source = INSTRUCTIONS.iter().fold(text.source.clone(), |s, (from, to)| s.replace(from, to));
    format!("#include <cuda>\n{source}\n{}\n", entry(&format!("shim::call({});", text.name)))
}

/// The function that runs `call` for all threads.
fn entry(call: &str) -> String {
    format!(
        "extern \"C\" const char* marlin_run(uint8_t* const* buffers, uint32_t count, const uint32_t* groups, const uint32_t* threads) {{\n    \
         return shim::run(buffers, count, groups, threads, [] {{ {call} }});\n}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kernel of 64 threads that writes what `value` says for each.
    fn run(name: &str, value: &str) -> Result<Vec<u32>, String> {
        let folder =
            std::env::temp_dir().join(format!("marlin-metal-{name}-{}", std::process::id()));
        let emulation = Emulation { folder: folder.clone(), compiler: "c++".to_owned() };
        let text = format!(
            "#include <metal_stdlib>\nusing namespace metal;\n[[max_total_threads_per_threadgroup(64)]] [[kernel]] void \
             {name}(device uint32_t * const out [[buffer(0)]], uint32_t const i [[thread_index_in_threadgroup]]) {{\n\
             alignas(16) threadgroup char shared[256];\nthreadgroup uint32_t* const s = (threadgroup uint32_t*)shared;\n\
             {value}\n}}\n"
        );
        let text = Text { name: name.to_owned(), source: text, block: [64, 1, 1], shared_bytes: 0 };
        let code = translate(name, &text.source)?;
        let program = Programs::new(Target::Apple, emulation).build(&text, "metal", &code)?;
        let mut out = vec![0u32; 64];
        let done = program.run(&[out.as_mut_ptr().cast()], [1, 1, 1]);
        std::fs::remove_dir_all(&folder).map_err(|e| e.to_string())?;
        done.map(|()| out).map_err(|error| error.to_string())
    }

    #[test]
    fn threads_meet_at_barriers_and_lanes_in_their_simdgroup() {
        let barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);";
        let turned = run("turned", &format!("s[i] = i; {barrier} out[i] = s[63 - i];"));
        assert_eq!(turned.unwrap(), (0..64).rev().collect::<Vec<u32>>());
        let sums = run("sums", "out[i] = simd_sum(i) + simd_shuffle_xor(i, 1);").unwrap();
        let expected = |i: u32| if i < 32 { 496 } else { 1520 } + (i ^ 1);
        assert_eq!(sums, (0..64).map(expected).collect::<Vec<u32>>());
        // Lanes that have ended are not counted.
        let few = run("few", "if (i % 32 >= 3) { out[i] = 7; return; } out[i] = simd_sum(1u);");
        let expected = |i: u32| if i % 32 < 3 { 3 } else { 7 };
        assert_eq!(few.unwrap(), (0..64).map(expected).collect::<Vec<u32>>());
    }

    #[test]
    fn a_barrier_that_only_some_threads_meet_is_an_error() {
        let barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);";
        let split =
            format!("if (i < 5) {{ {barrier} }} else {{ simd_sum(i); {barrier} }} out[i] = i;");
        for (name, value) in [
            ("split", split),
            ("parted", format!("if (i == 40) {{ {barrier} }} simd_sum(i); out[i] = 1;")),
        ] {
            let error = run(name, &value).unwrap_err();
            assert!(error.contains("wait for each other at different places"), "{error}");
        }
    }

    #[test]
    fn a_simdgroup_multiplies_matrices_that_all_its_lanes_mean() {
        let barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);";
        // Of `a[r][c] = 10 r + c` and `b[r][c] = r` where `c` is zero, else one: transposed, one and the other way.
        let product = |at: &str| {
            format!(
                "threadgroup half* const a = (threadgroup half*)shared; threadgroup half* const b = a + 64;\n\
                 a[i] = half(10 * (i / 8) + i % 8); b[i] = half(i % 8 == 0 ? i / 8 : 1); {barrier}\n\
                 simdgroup_half8x8 x, y; simdgroup_load(x, {at}, 8, 0, true); simdgroup_load(y, b, 8, 0, false);\n\
                 simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.5f);\n\
                 simdgroup_multiply_accumulate(sum, x, y, sum); {barrier}\n\
                 threadgroup float* const f = (threadgroup float*)shared;\n\
                 simdgroup_store(sum, f, 8); {barrier} out[i] = uint32_t(2 * f[i]);"
            )
        };
        let expected = |i: u32| {
            let (row, column) = (i / 8, i % 8);
            let right = |k: u32| if column == 0 { k } else { 1 };
            2 * (0..8).map(|k| (10 * k + row) * right(k)).sum::<u32>() + 1
        };
        let found = run("product", &product("a")).unwrap();
        assert_eq!(found, (0..64).map(expected).collect::<Vec<u32>>());
        let error = run("parted_load", &product("a + (i == 33 ? 8 : 0)")).unwrap_err();
        assert!(error.contains("different matrices"), "{error}");
    }

    #[test]
    fn text_that_does_not_compile_is_an_error_that_names_it() {
        let error = run("broken", "out[i] = nothing;").unwrap_err();
        assert!(error.contains("broken-0.cpp") && error.contains("nothing"), "{error}");
    }
}
