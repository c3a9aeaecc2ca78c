//! A server of made-up tokens that gives every stream one token per step: what a load client can receive, and what measuring
//! with it costs, without a model.
//!
//!     cargo run --release -p marlin-cli --example stream_server -- 127.0.0.1:8089 1600
//!     marlin bench serve http://127.0.0.1:8089 --concurrency 64 --requests 256 --max-tokens 2000 --one-event-per-token
//!
//! Arguments: the address, and microseconds per step (0: as fast as it can).

#[path = "../tests/common/stream_server.rs"]
mod stream_server;

use std::net::TcpListener;
use std::time::Duration;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, step_us] = arguments.as_slice() else { panic!("expected ADDRESS MICROSECONDS") };
    let step = Duration::from_micros(step_us.parse().expect("microseconds per step"));
    let listener = TcpListener::bind(address).expect("an address that is free");
    stream_server::serve(&listener, step);
}
