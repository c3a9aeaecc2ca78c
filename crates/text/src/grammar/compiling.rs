//! Where grammars of clients are compiled: on threads with a deep stack, since the compilers recurse over what the client sent; a
//! few at a time; given up after a while.
//!
//! A usual grammar takes milliseconds, so when every place is taken it is worth waiting for one, for half the time that compiling may
//! take; then what is there takes long, and whoever asks is told so. Nothing can stop a compiler in its work. One that was given up goes on until its fuel is used up, keeps its place, and from then on
//! gives way to everything else on the machine where the system lets a thread do so.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::Duration;

/// Address space, of which a usual grammar touches a few pages.
const STACK: usize = 64 << 20;
/// Most that wait for a place: each keeps a thread of its caller.
const MAX_WAITING: usize = 128;

/// What grammars of clients may take. Clones share the places in which they are compiled.
#[derive(Debug, Clone)]
pub struct GrammarLimits {
    /// Depth of a schema.
    pub max_depth: usize,
    /// Values in a schema, keys not counted.
    pub max_nodes: usize,
    /// Time after which compiling is given up.
    pub compile_time: Duration,
    /// Grammars that are compiled at the same time, those that were given up and go on among them.
    pub max_compiling: usize,
    /// Who is there now.
    pub compiling: Compiling,
}

/// Grammars that are being compiled, those that were given up among them. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct Compiling(Arc<Places>);

#[derive(Debug, Default)]
struct Places {
    taken: Mutex<Taken>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Taken {
    places: usize,
    waiting: usize,
}

impl Compiling {
    /// How many.
    pub fn count(&self) -> usize {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner).places
    }
}

impl Default for GrammarLimits {
    fn default() -> Self {
        Self {
            max_depth: 64,
            max_nodes: 20_000,
            compile_time: Duration::from_secs(2),
            max_compiling: 4,
            compiling: Compiling::default(),
        }
    }
}

/// Why there is no result.
pub(super) enum Unfinished {
    /// Every place is taken.
    Full,
    /// The system has no thread.
    NoThread(io::Error),
    /// It takes too long, or broke off.
    GivenUp,
}

impl GrammarLimits {
    /// The result of `work`, if it comes in time.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unfinished> {
        let turn = Turn::take(self).ok_or(Unfinished::Full)?;
        let worker = Arc::new(priority::Worker::default());
        let (send, receive) = mpsc::sync_channel(1);
        let own = worker.clone();
        let work = move || {
            let _working = own.begin();
            let result = work();
            drop(turn);
            // Nobody listens any more when it took too long.
            let _ = send.send(result);
        };
        std::thread::Builder::new()
            .name("grammar".into())
            .stack_size(STACK)
            .spawn(work)
            .map_err(Unfinished::NoThread)?;
        receive.recv_timeout(self.compile_time).map_err(|_| {
            worker.give_way();
            Unfinished::GivenUp
        })
    }
}

/// One of the places.
struct Turn(Compiling);

impl Turn {
    fn take(limits: &GrammarLimits) -> Option<Self> {
        let places = &limits.compiling.0;
        let mut taken = places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.places >= limits.max_compiling {
            if taken.waiting == MAX_WAITING {
                return None;
            }
            taken.waiting += 1;
            let full = |taken: &mut Taken| taken.places >= limits.max_compiling;
            let waited = places.freed.wait_timeout_while(taken, limits.compile_time / 2, full);
            (taken, _) = waited.unwrap_or_else(PoisonError::into_inner);
            taken.waiting -= 1;
            if full(&mut taken) {
                return None;
            }
        }
        taken.places += 1;
        Some(Self(limits.compiling.clone()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.0.taken.lock().unwrap_or_else(PoisonError::into_inner).places -= 1;
        self.0.0.freed.notify_one();
    }
}

/// On Linux a thread has a priority of its own, which another may lower.
#[cfg(target_os = "linux")]
mod priority {
    use rustix::process::{Pid, setpriority_process};
    use std::sync::{Mutex, PoisonError};

    /// A tenth of what others get: it does not hold them up, and still ends and leaves its place where the machine is always busy.
    const LOW: i32 = 10;

    /// A thread, while it works: its number may be another's afterwards.
    #[derive(Default)]
    pub struct Worker(Mutex<Option<Pid>>);

    /// It ends when this is dropped, also by a panic.
    pub struct Working<'a>(&'a Worker);

    impl Worker {
        fn set(&self, thread: Option<Pid>) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = thread;
        }

        /// The thread that calls this works from here on.
        pub fn begin(&self) -> Working<'_> {
            self.set(Some(rustix::thread::gettid()));
            Working(self)
        }

        /// Lets everything else go before it, if it still works.
        pub fn give_way(&self) {
            let thread = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(thread) = *thread {
                // Refused, it goes on as it is, and in its place.
                let _ = setpriority_process(Some(thread), LOW);
            }
        }
    }

    impl Drop for Working<'_> {
        fn drop(&mut self) {
            self.0.set(None);
        }
    }
}

/// Elsewhere the number of places is what bounds it.
#[cfg(not(target_os = "linux"))]
mod priority {
    #[derive(Default)]
    pub struct Worker(());

    pub struct Working;

    impl Worker {
        pub fn begin(&self) -> Working {
            Working
        }

        pub fn give_way(&self) {}
    }
}
