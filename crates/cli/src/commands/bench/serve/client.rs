//! The load itself: one thread that watches every connection, so that it costs the server, which usually shares the machine with it,
//! as little as it can. A stream per thread would wake a thread for every event; here, what has arrived meanwhile on any
//! stream is read at one go.

use super::answer::{Answer, Fault, refusal};
use super::connection::Connection;
use super::target::Target;
use crate::http::{Events, Head, HttpError, Piece, Response};
use mio::{Interest, Poll, Token};
use std::io::{ErrorKind, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Most requests under way; later ones of an open loop wait, and the report tells for how long.
pub const MOST_AT_ONCE: usize = 4096;
/// Between looks at the clock for streams that fell silent.
const TICK: Duration = Duration::from_millis(100);
const BUFFER: usize = 64 << 10;
/// Bytes kept of a body that is no stream.
const LONGEST_BODY: usize = 16 << 20;

/// When requests are sent.
#[derive(Debug)]
pub enum Schedule {
    /// This many at once, each followed by the next when it is answered.
    Closed(usize),
    /// At these times from the start.
    Open(Vec<Duration>),
}

/// What a run does.
pub struct Plan<'a> {
    /// Where.
    pub target: &'a Target,
    /// When.
    pub schedule: Schedule,
    /// How many.
    pub requests: usize,
    /// Silence after which a request has failed.
    pub timeout: Duration,
    /// The HTTP message of a request.
    pub message: &'a dyn Fn(usize) -> Vec<u8>,
    /// Told after every answer.
    pub answered: &'a dyn Fn(),
    /// Set when the run is to end early.
    pub stop: &'a AtomicBool,
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    /// By number of the request; those that were sent and not stopped.
    pub answers: Vec<(usize, Answer)>,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Most requests that were under way.
    pub most_at_once: usize,
    /// The longest that a request was sent after its time.
    pub latest: Duration,
    /// Time on a processor that this took, where the system tells.
    pub busy: Option<Duration>,
}

/// A request under way.
struct Job {
    index: usize,
    answer: Answer,
    message: Vec<u8>,
    written: usize,
    response: Response,
    events: Events,
    head: Option<Head>,
    /// Of a response that is no stream.
    body: Vec<u8>,
    /// When the last byte came or went.
    moved: Instant,
    /// It went out on a connection that had been kept, which the server may have closed meanwhile.
    on_kept: bool,
}

/// A place for one request at a time, and its connection, kept from one to the next.
#[derive(Default)]
struct Slot {
    stream: Option<Connection>,
    job: Option<Job>,
}

/// What became of a request when its connection was looked at.
enum Step {
    /// More will come.
    Waits,
    /// The response is whole; whether the connection can be kept.
    Whole(bool),
}

struct Client<'a> {
    plan: &'a Plan<'a>,
    poll: Poll,
    slots: Vec<Slot>,
    free: Vec<usize>,
    answers: Vec<(usize, Answer)>,
    buffer: Vec<u8>,
}

/// Sends every request of `plan` and reads every answer.
///
/// # Errors
/// When the system gives no means to watch connections. A request that fails is an answer with a fault.
pub fn run(plan: &Plan) -> std::io::Result<Outcome> {
    let mut client = Client {
        plan,
        poll: Poll::new()?,
        slots: Vec::new(),
        free: Vec::new(),
        answers: Vec::with_capacity(plan.requests),
        buffer: vec![0; BUFFER],
    };
    let before = time_on_processor();
    let (seconds, most_at_once, latest) = client.run()?;
    let busy = time_on_processor().zip(before).map(|(after, before)| after.saturating_sub(before));
    client.answers.sort_by_key(|(index, _)| *index);
    Ok(Outcome { answers: client.answers, seconds, most_at_once, latest, busy })
}

impl Client<'_> {
    fn run(&mut self) -> std::io::Result<(f64, usize, Duration)> {
        let plan = self.plan;
        let start = Instant::now();
        let (mut next, mut most_at_once, mut latest) = (0, 0, Duration::ZERO);
        let mut looked = start;
        let mut events = mio::Events::with_capacity(1024);
        // Freed while events are gone through: used only after, so that no event meets a newer connection.
        let mut freed = Vec::new();
        loop {
            let mut until_next = TICK;
            while next < plan.requests && !plan.stop.load(Ordering::Relaxed) {
                let under_way = self.slots.len() - self.free.len();
                match &plan.schedule {
                    Schedule::Closed(most) if under_way >= *most => break,
                    Schedule::Closed(_) => {}
                    Schedule::Open(_) if under_way >= MOST_AT_ONCE => break,
                    Schedule::Open(times) => match times[next].checked_sub(start.elapsed()) {
                        Some(early) if !early.is_zero() => {
                            until_next = until_next.min(early);
                            break;
                        }
                        _ => latest = latest.max(start.elapsed().saturating_sub(times[next])),
                    },
                }
                let slot = self.free.pop().unwrap_or_else(|| {
                    self.slots.push(Slot::default());
                    self.slots.len() - 1
                });
                self.send(slot, next);
                next += 1;
                most_at_once = most_at_once.max(self.slots.len() - self.free.len());
            }
            let under_way = self.slots.len() - self.free.len();
            let over = next == plan.requests || plan.stop.load(Ordering::Relaxed);
            if over && under_way == 0 || plan.stop.load(Ordering::Relaxed) {
                break;
            }
            match self.poll.poll(&mut events, Some(until_next)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                let slot = event.token().0;
                if self.ready(slot) {
                    freed.push(slot);
                }
            }
            self.free.append(&mut freed);
            if looked.elapsed() >= TICK {
                looked = Instant::now();
                self.give_up_on_silent(looked);
            }
        }
        Ok((start.elapsed().as_secs_f64(), most_at_once, latest))
    }

    /// Puts request `index` into a slot. It may fail at once, and is then answered.
    fn send(&mut self, slot: usize, index: usize) {
        let message = (self.plan.message)(index);
        let now = Instant::now();
        self.slots[slot].job = Some(Job {
            index,
            answer: Answer::new(now),
            message,
            written: 0,
            response: Response::default(),
            events: Events::default(),
            head: None,
            body: Vec::new(),
            moved: now,
            on_kept: self.slots[slot].stream.is_some(),
        });
        let started = self.connect(slot).and_then(|()| self.slots[slot].write());
        if self.settle(slot, started.map(|()| Step::Waits)) {
            self.free.push(slot);
        }
    }

    fn connect(&mut self, slot: usize) -> Result<(), Fault> {
        let place = &mut self.slots[slot];
        if place.stream.is_none() {
            let mut stream = Connection::open(self.plan.target)?;
            self.poll.registry().register(
                stream.socket(),
                Token(slot),
                Interest::READABLE | Interest::WRITABLE,
            )?;
            place.stream = Some(stream);
        }
        Ok(())
    }

    /// Goes on with a slot whose connection can be written or read; whether it is free then.
    fn ready(&mut self, slot: usize) -> bool {
        let place = &mut self.slots[slot];
        if place.job.is_none() {
            // Kept for the next request: closed by the server, or talking out of turn.
            place.stream = None;
            return false;
        }
        let step = place.write().and_then(|()| place.read(&mut self.buffer));
        self.settle(slot, step)
    }

    /// Ends the request of a slot if it is over; whether the slot is free.
    fn settle(&mut self, slot: usize, step: Result<Step, Fault>) -> bool {
        let place = &mut self.slots[slot];
        let fault = match step {
            Ok(Step::Waits) => return false,
            Ok(Step::Whole(keep)) => {
                if !keep {
                    place.stream = None;
                }
                None
            }
            Err(fault) => {
                place.stream = None;
                let untouched = |job: &Job| job.on_kept && job.response.is_untouched();
                if let Some(job) = place.job.as_mut().filter(|job| untouched(job)) {
                    // The server closed the kept connection before it saw the request: that is no failure of it.
                    (job.on_kept, job.written) = (false, 0);
                    let again = self.connect(slot).and_then(|()| self.slots[slot].write());
                    return self.settle(slot, again.map(|()| Step::Waits));
                }
                Some(fault)
            }
        };
        if let Some(mut job) = self.slots[slot].job.take() {
            job.answer.fault = fault;
            self.answers.push((job.index, job.answer));
            (self.plan.answered)();
        }
        true
    }

    fn give_up_on_silent(&mut self, now: Instant) {
        for slot in 0..self.slots.len() {
            let silent = |job: &Job| now.saturating_duration_since(job.moved) > self.plan.timeout;
            if let Some(job) = self.slots[slot].job.as_mut().filter(|job| silent(job)) {
                job.on_kept = false;
                let words = format!("nothing came for {} s", self.plan.timeout.as_secs());
                if self.settle(slot, Err(Fault(words))) {
                    self.free.push(slot);
                }
            }
        }
    }
}

impl Slot {
    /// As much of the request as the connection takes now.
    fn write(&mut self) -> Result<(), Fault> {
        let (Some(stream), Some(job)) = (&mut self.stream, &mut self.job) else { return Ok(()) };
        while job.written < job.message.len() {
            match stream.write(&job.message[job.written..]) {
                Ok(0) => return Err(Fault("the connection takes no more of the request".into())),
                Ok(count) => {
                    job.written += count;
                    job.moved = Instant::now();
                }
                Err(error) => match error.kind() {
                    // Not connected yet, or full.
                    ErrorKind::WouldBlock | ErrorKind::NotConnected => break,
                    ErrorKind::Interrupted => {}
                    _ => return Err(error.into()),
                },
            }
        }
        Ok(())
    }

    /// Everything that has arrived.
    fn read(&mut self, buffer: &mut [u8]) -> Result<Step, Fault> {
        let (Some(stream), Some(job)) = (&mut self.stream, &mut self.job) else {
            return Ok(Step::Waits);
        };
        loop {
            let count = match stream.read(buffer) {
                Ok(count) => count,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::NotConnected => return Ok(Step::Waits),
                    ErrorKind::Interrupted => continue,
                    _ => return Err(error.into()),
                },
            };
            let now = Instant::now();
            if count == 0 {
                job.response.close()?;
                return job.end(now).map(|()| Step::Whole(false));
            }
            job.moved = now;
            if job.take(&buffer[..count], now)? {
                let keep = job.head.as_ref().is_some_and(|head| head.keep_alive);
                // Read until nothing is left: some systems tell of more only after that.
                let nothing_left =
                    matches!(stream.read(buffer), Err(e) if e.kind() == ErrorKind::WouldBlock);
                return job.end(now).map(|()| Step::Whole(keep && nothing_left));
            }
        }
    }
}

impl Job {
    /// Bytes of the response; whether it is whole.
    fn take(&mut self, mut bytes: &[u8], now: Instant) -> Result<bool, Fault> {
        while let Some(piece) = self.response.next(&mut bytes)? {
            match piece {
                Piece::Head(head) => self.head = Some(head),
                Piece::Body(part) if self.is_stream() => {
                    let answer = &mut self.answer;
                    self.events.push(part, |data| answer.event(data, now))?;
                }
                Piece::Body(part) => {
                    if self.body.len() + part.len() > LONGEST_BODY {
                        return Err(HttpError::TooLong(
                            "an answer that is no stream",
                            LONGEST_BODY,
                        )
                        .into());
                    }
                    self.body.extend_from_slice(part);
                }
                Piece::End if bytes.is_empty() => return Ok(true),
                Piece::End => return Err(Fault("bytes after the end of the response".into())),
            }
        }
        Ok(false)
    }

    fn is_stream(&self) -> bool {
        self.head
            .as_ref()
            .is_some_and(|head| head.status == 200 && head.content_type == "text/event-stream")
    }

    fn end(&mut self, now: Instant) -> Result<(), Fault> {
        let status = self.head.as_ref().map_or(0, |head| head.status);
        if status != 200 {
            return Err(refusal(status, &self.body));
        }
        if !self.is_stream() {
            self.answer.whole(&self.body, now)?;
        } else if self.events.is_cut_short() {
            return Err(Fault("the last event is not whole".into()));
        }
        self.answer.end(now)
    }
}

/// What this thread has run so far.
fn time_on_processor() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
}
