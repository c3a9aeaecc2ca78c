//! Threads for parallel regions of a few microseconds.
//!
//! A region is `tasks` calls of one closure, claimed one by one by the caller and by every worker
//! that comes in time. Every thread claims first from a range of its own, the same for regions of
//! as many tasks, so that what one operator wrote is still in the cache of the core whose next
//! operator reads it; then it helps with the other ranges. The caller closes the region when nothing is left to
//! claim and waits only for the workers that entered: one that the operating system keeps off
//! its core costs nothing but its share, so a busy neighbour cannot stall every region.
//!
//! `gate` packs the state a worker decides on: `epoch << 32 | OPEN | workers inside`. A worker
//! enters by a compare-exchange that increments the count of an open gate; the closure is
//! therefore alive for as long as anyone is inside. Idle workers spin, then yield, then park.

pub(crate) mod ahead;

use ahead::{Ahead, Fetched};
use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Gate bit: workers may enter.
const OPEN: u64 = 1 << 31;
/// Gate bits: workers inside.
const INSIDE: u64 = OPEN - 1;
/// How long a waiting thread spins before it starts to yield its core.
const SPIN: Duration = Duration::from_micros(40);
/// How long an idle worker waits in all before it parks.
const WAIT: Duration = Duration::from_micros(1000);

thread_local! {
    /// Whether this thread is inside a region, of whichever pool.
    static IN_REGION: Cell<bool> = const { Cell::new(false) };
}

/// The closure of the open region, its lifetime erased.
#[derive(Clone, Copy)]
struct Job {
    run: *const (dyn Fn(usize) + Sync),
    tasks: usize,
}

/// Most ranges tasks are divided into: more threads share them.
const RANGES: usize = 8;

/// The next task of a range, alone in its cache lines.
#[repr(align(128))]
struct Next(AtomicUsize);

struct Shared {
    ahead: Ahead,
    gate: AtomicU64,
    next: Box<[Next]>,
    threads: usize,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    parked: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

// SAFETY: `job` is written only by the holder of the region while the gate is closed and nobody
// is inside, and read only by threads inside; the gate's acquire/release orders the two. The
// closure it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: see above; the pointer is only followed while the region is alive.
unsafe impl Send for Shared {}

/// A fixed set of threads that run parallel regions together with the calling thread.
pub struct Pool {
    shared: Arc<Shared>,
    /// Held by the region that is open; what the caller has fetched ahead.
    region: Mutex<Fetched>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads, the caller of each region being one of them: 1 spawns none.
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        let next = (0..threads.min(RANGES)).map(|_| Next(AtomicUsize::new(0))).collect();
        let shared = Arc::new(Shared {
            ahead: Ahead::default(),
            gate: AtomicU64::new(0),
            next,
            threads,
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
            parked: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let spawn = |i: usize| {
            let shared = Arc::clone(&shared);
            let name = format!("marlin-cpu-{i}");
            // A thread the system refuses is one fewer, not an error: the caller works too.
            std::thread::Builder::new().name(name).spawn(move || shared.work(i)).ok()
        };
        let workers = (1..threads).filter_map(spawn).collect();
        Self { shared, region: Mutex::default(), workers }
    }

    /// Says what the region after the next one will read, matrix by matrix: threads that wait fetch
    /// it, each its own share of the rows.
    pub fn expect(&self, matrices: &[(usize, usize)]) {
        if self.workers.is_empty() {
            return;
        }
        self.shared.ahead.set(matrices);
    }

    /// Threads that take part, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Threads a region started here could use: 1 inside another region.
    pub fn available_threads(&self) -> usize {
        if IN_REGION.get() { 1 } else { self.threads() }
    }

    /// Calls `run(0) … run(tasks - 1)`, each once, on any thread, and returns when all are done.
    /// Inside another region, or while another thread uses the pool, all run on this thread.
    ///
    /// # Panics
    /// When a task panics.
    pub fn run(&self, tasks: usize, run: impl Fn(usize) + Sync) {
        let mut region =
            match (tasks > 1 && self.available_threads() > 1).then(|| self.region.try_lock()) {
                Some(Ok(region)) => region,
                _ => return (0..tasks).for_each(run),
            };
        let run: &(dyn Fn(usize) + Sync) = &run;
        self.shared.open(run, tasks);
        IN_REGION.set(true);
        let claimed = catch_unwind(AssertUnwindSafe(|| self.shared.claim(0, run, tasks)));
        IN_REGION.set(false);
        // Unwinding or not, nobody may still be inside when `run` goes out of scope.
        self.shared.close(&mut region);
        drop(region);
        let caught = self.shared.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Some(payload) = claimed.err().or(caught) {
            resume_unwind(payload);
        }
    }

    /// Cuts `out` into pieces of `chunk` elements and calls `run(index, piece)` for each.
    pub fn run_chunks<T: Send>(
        &self,
        out: &mut [T],
        chunk: usize,
        run: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let (len, base) = (out.len(), Pointer(out.as_mut_ptr()));
        self.run(len.div_ceil(chunk.max(1)), |i| {
            let start = i * chunk;
            // SAFETY: tasks have distinct indices, so the pieces are disjoint and inside `out`,
            // which stays borrowed until `run` returns.
            let piece = unsafe {
                std::slice::from_raw_parts_mut(base.get().add(start), chunk.min(len - start))
            };
            run(i, piece);
        });
    }

    /// Cuts the columns of `out: [rows, columns]` into bands of `band` columns and calls
    /// `run(columns of the band, band)` for each.
    pub fn run_columns(
        &self,
        out: &mut [f32],
        columns: usize,
        band: usize,
        run: impl Fn(Range<usize>, &mut ColumnBand<'_>) + Sync,
    ) {
        let rows = out.len() / columns.max(1);
        assert_eq!(out.len(), rows * columns, "output fills [rows, columns]");
        let base = Pointer(out.as_mut_ptr());
        self.run(columns.div_ceil(band.max(1)), |i| {
            let range = i * band..columns.min((i + 1) * band);
            let mut part =
                ColumnBand { base: base.get(), rows, columns, range: range.clone(), _out: &() };
            run(range, &mut part);
        });
    }

    /// Cuts several matrices of as many rows, each `(out: [rows, columns], columns, band)`, into
    /// blocks of `height` rows and `band` columns and calls `run(matrix, rows of the block, columns of
    /// the block, block)` for each, rows outermost. The first row of a block is its row 0.
    pub fn run_parts(
        &self,
        outs: Vec<(&mut [f32], usize, usize)>,
        height: usize,
        run: impl Fn(usize, Range<usize>, Range<usize>, &mut ColumnBand<'_>) + Sync,
    ) {
        let rows = outs.first().map_or(0, |(out, columns, _)| out.len() / columns.max(&1));
        let mut tasks = Vec::new();
        let mut matrices = Vec::with_capacity(outs.len());
        for (out, columns, band) in outs {
            assert_eq!(out.len(), rows * columns, "output fills [rows, columns]");
            matrices.push((Pointer(out.as_mut_ptr()), columns, band.max(1)));
        }
        for top in (0..rows).step_by(height.max(1)) {
            for (i, (_, columns, band)) in matrices.iter().enumerate() {
                tasks.extend((0..*columns).step_by(*band).map(|left| (i, top, left)));
            }
        }
        self.run(tasks.len(), |task| {
            let (i, top, left) = tasks[task];
            let (base, columns, band) = &matrices[i];
            let range = left..*columns.min(&(left + band));
            let height = top..rows.min(top + height);
            // SAFETY: a pointer to an existing row of the matrix.
            let base = unsafe { base.get().add(top * columns) };
            let (rows, columns) = (height.len(), *columns);
            let mut part = ColumnBand { base, rows, columns, range: range.clone(), _out: &() };
            run(i, height, range, &mut part);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = self.shared.lock.lock();
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // Tasks' panics are caught, so a worker ends normally.
            let _ = worker.join();
        }
    }
}

/// A pointer whose disjoint parts are written by different tasks.
struct Pointer<T>(*mut T);

impl<T> Pointer<T> {
    /// A method, so that closures capture the wrapper and not the bare pointer.
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: every user hands each task a part of its own.
unsafe impl<T: Send> Sync for Pointer<T> {}

/// Consecutive rows and columns of a row-major matrix, owned by one task.
pub struct ColumnBand<'a> {
    base: *mut f32,
    rows: usize,
    columns: usize,
    range: Range<usize>,
    _out: &'a (),
}

impl ColumnBand<'_> {
    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.columns
    }

    /// The band's columns of `row`.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: blocks have disjoint rows or columns inside the matrix and the row is in bounds, so
        // this part of the matrix belongs to this block alone; `&mut self` makes it unique.
        unsafe {
            let start = self.base.add(row * self.columns + self.range.start);
            std::slice::from_raw_parts_mut(start, self.range.len())
        }
    }
}

impl Shared {
    /// Publishes a region. The caller holds the region lock and the gate is closed and empty.
    fn open(&self, run: &(dyn Fn(usize) + Sync), tasks: usize) {
        let run: *const (dyn Fn(usize) + Sync + '_) = run;
        // SAFETY: only the lifetime changes; `close` returns before the closure dies.
        let run: *const (dyn Fn(usize) + Sync + 'static) = unsafe { std::mem::transmute(run) };
        // SAFETY: the gate is closed and nobody is inside, so nobody reads `job`.
        unsafe { *self.job.get() = Some(Job { run, tasks }) };
        self.next.iter().for_each(|next| next.0.store(0, Ordering::Relaxed));
        let epoch = (self.gate.load(Ordering::Relaxed) >> 32) + 1;
        self.gate.store(epoch << 32 | OPEN, Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) > 0 {
            let _guard = self.lock.lock();
            self.wake.notify_all();
        }
    }

    /// Shuts the gate and waits for the workers inside.
    fn close(&self, fetched: &mut Fetched) {
        self.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut backoff = Backoff::default();
        while self.gate.load(Ordering::Acquire) & INSIDE != 0 {
            if !self.ahead.fetch(fetched, 0, self.threads) {
                backoff.wait();
            }
        }
    }

    /// Claims and runs tasks until none is left, as thread `thread`.
    fn claim(&self, thread: usize, run: &(dyn Fn(usize) + Sync), tasks: usize) {
        let ranges = self.next.len();
        let own = thread * ranges / self.threads;
        for range in (own..ranges).chain(0..own) {
            let (start, end) = (range * tasks / ranges, (range + 1) * tasks / ranges);
            loop {
                let task = start + self.next[range].0.fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                run(task);
            }
        }
    }

    /// Life of a worker.
    fn work(&self, thread: usize) {
        IN_REGION.set(true);
        let mut seen = 0;
        let mut fetched = Fetched::default();
        while let Some(epoch) = self.enter(seen, thread, &mut fetched) {
            seen = epoch;
            // SAFETY: this thread is counted as inside, so `job` is set and the closure alive.
            let result = unsafe {
                let job = (*self.job.get()).expect("an open gate has a job");
                catch_unwind(AssertUnwindSafe(|| self.claim(thread, &*job.run, job.tasks)))
            };
            if let Err(payload) = result {
                *self.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(payload);
            }
            self.gate.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for an open gate of another epoch than `seen` and enters; `None` to end the thread.
    fn enter(&self, seen: u64, thread: usize, fetched: &mut Fetched) -> Option<u64> {
        let mut backoff = Backoff::default();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let gate = self.gate.load(Ordering::Acquire);
            if gate & OPEN != 0 && gate >> 32 != seen {
                let entered = self.gate.compare_exchange_weak(
                    gate,
                    gate + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if entered.is_ok() {
                    return Some(gate >> 32);
                }
            } else if self.ahead.fetch(fetched, thread, self.threads) {
                continue;
            } else if backoff.wait() > WAIT {
                self.park(seen);
                backoff = Backoff::default();
            }
        }
    }

    /// Sleeps until a gate of another epoch than `seen` opens.
    fn park(&self, seen: u64) {
        let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        self.parked.fetch_add(1, Ordering::SeqCst);
        // `open` stores the gate before it reads `parked`, this counts itself before it reads the
        // gate: one of the two sees the other.
        loop {
            let gate = self.gate.load(Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) || gate & OPEN != 0 && gate >> 32 != seen {
                break;
            }
            guard = self.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
        self.parked.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waiting that gets politer with time.
#[derive(Default)]
struct Backoff {
    turns: u32,
    start: Option<Instant>,
}

impl Backoff {
    /// Waits a little and returns the time waited so far.
    fn wait(&mut self) -> Duration {
        self.turns += 1;
        if self.turns < 64 {
            std::hint::spin_loop();
            return Duration::ZERO;
        }
        let waited = self.start.get_or_insert_with(Instant::now).elapsed();
        if waited < SPIN {
            (0..16).for_each(|_| std::hint::spin_loop());
        } else {
            std::thread::yield_now();
        }
        waited
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_thread_count() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..50 {
                    pool.run(tasks, |i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 50));
            }
        }
    }

    #[test]
    fn parked_workers_wake() {
        let pool = Pool::new(2);
        for _ in 0..5 {
            std::thread::sleep(WAIT * 3);
            let both = std::sync::Barrier::new(2);
            // Needs two threads at once: hangs if the worker stays parked.
            pool.run(2, |_| {
                both.wait();
            });
        }
    }

    #[test]
    fn nested_regions_run_inline() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        pool.run(8, |_| {
            assert_eq!(pool.available_threads(), 1);
            pool.run(5, |i| {
                total.fetch_add(i, Ordering::Relaxed);
            });
        });
        assert_eq!(total.load(Ordering::Relaxed), 80);
    }

    #[test]
    fn threads_may_share_a_pool() {
        let pool = Pool::new(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(4, |_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 3200);
    }

    #[test]
    fn a_panicking_task_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(3);
        for bad in 0..4 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(4, |i| assert_ne!(i, bad, "on purpose"));
            }));
            assert!(caught.is_err());
        }
        let total = AtomicUsize::new(0);
        pool.run(10, |_| {
            total.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(total.load(Ordering::Relaxed), 10);
    }

    #[test]
    fn pieces_cover_the_output() {
        let pool = Pool::new(2);
        for (rows, columns, band) in [(3, 10, 4), (1, 1, 64), (2, 8, 8)] {
            let mut out = vec![0.0; rows * columns];
            pool.run_columns(&mut out, columns, band, |range, part| {
                for r in 0..rows {
                    for (y, c) in part.row(r).iter_mut().zip(range.clone()) {
                        *y += (r * columns + c) as f32;
                    }
                }
            });
            assert!(out.iter().enumerate().all(|(i, &y)| y == i as f32));
            pool.run_chunks(&mut out, band, |i, piece| {
                for (j, y) in piece.iter_mut().enumerate() {
                    assert_eq!(*y, (i * band + j) as f32);
                    *y = -1.0;
                }
            });
            assert!(out.iter().all(|&y| y == -1.0));
        }
    }
}
