//! Connections: accepted, bounded, drained.

use super::{Config, Server};
use axum::Router;
use axum::extract::Request;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;

/// Least that the reader of heads works with, bytes.
const MIN_HEAD_BYTES: usize = 8 << 10;

/// A server that listens.
pub struct Listening {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    server: Arc<Server>,
}

impl Listening {
    /// Listens at `address`; with `tls`, over it.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind(
        server: Arc<Server>,
        address: SocketAddr,
        tls: Option<ServerConfig>,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let tls = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
        Ok(Self { listener, tls, server })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `stop` says so; then takes nothing new, lets what is under way end within the time that is set for it, and
    /// cuts the rest off. A second word from `stop` cuts at once.
    pub async fn run(self, mut stop: watch::Receiver<u32>) {
        let Self { listener, tls, server } = self;
        let router = server.router();
        let permits = Arc::new(Semaphore::new(server.config.max_connections));
        let (ending, ends) = watch::channel(Ending::No);
        let accept = async |ends: &watch::Receiver<Ending>, permits: &Arc<Semaphore>| {
            match listener.accept().await {
                Err(error) => {
                    // Out of descriptors: others have to close first.
                    tracing::warn!(%error, "a connection was not accepted");
                    sleep(Duration::from_millis(50)).await;
                }
                Ok((stream, _)) => match permits.clone().try_acquire_owned() {
                    Err(_) => tracing::warn!("too many connections, one is closed"),
                    Ok(permit) => {
                        let router = router.clone();
                        let Config {
                            header_timeout: head_time,
                            idle_timeout,
                            max_head_bytes,
                            max_header_fields,
                            ..
                        } = server.config;
                        let connection = Connection {
                            router,
                            ends: ends.clone(),
                            head_time,
                            idle_timeout,
                            max_head_bytes,
                            max_header_fields,
                        };
                        let tls = tls.clone();
                        tokio::spawn(async move {
                            connection.serve(stream, tls).await;
                            drop(permit);
                        });
                    }
                },
            }
        };
        loop {
            tokio::select! {
                () = accept(&ends, &permits) => {}
                () = told(&mut stop, 1) => break,
            }
        }
        server.drain();
        let _ = ending.send(Ending::Soon);
        // Whoever asks meanwhile is told that the server is about to stop, and waits for nobody.
        let (late, late_ends) = watch::channel(Ending::No);
        let late_permits = Arc::new(Semaphore::new(server.config.max_connections));
        // A connection ends with the last byte of its response, not when that has been made.
        let most = u32::try_from(server.config.max_connections).unwrap_or(u32::MAX);
        let drained = timeout(server.config.drain, permits.acquire_many(most));
        tokio::pin!(drained);
        loop {
            tokio::select! {
                () = accept(&late_ends, &late_permits) => {}
                _ = drained.as_mut() => break,
                () = told(&mut stop, 2) => break,
            }
        }
        let _ = ending.send(Ending::Now);
        let _ = late.send(Ending::Now);
        let _ = timeout(Duration::from_secs(1), permits.acquire_many(most)).await;
    }
}

/// How connections are to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Not.
    No,
    /// With the response that is being sent.
    Soon,
    /// As they are.
    Now,
}

/// Returns once `stop` has been said `times` times; never, if nobody can say it any more.
async fn told(stop: &mut watch::Receiver<u32>, times: u32) {
    if stop.wait_for(|told| *told >= times).await.is_err() {
        std::future::pending::<()>().await;
    }
}

struct Connection {
    router: Router,
    ends: watch::Receiver<Ending>,
    head_time: Duration,
    idle_timeout: Duration,
    max_head_bytes: usize,
    max_header_fields: usize,
}

impl Connection {
    async fn serve(self, stream: TcpStream, tls: Option<TlsAcceptor>) {
        // Events are small and are not to wait for more.
        let _ = stream.set_nodelay(true);
        match tls {
            None => self.speak(stream).await,
            Some(tls) => match timeout(self.head_time, tls.accept(stream)).await {
                Ok(Ok(stream)) => self.speak(stream).await,
                Ok(Err(error)) => tracing::debug!(%error, "no TLS"),
                Err(_) => tracing::debug!("a TLS handshake took too long"),
            },
        }
    }

    async fn speak(mut self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = TowerToHyperService::new(self.router);
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(self.idle_timeout.max(self.head_time))
            .max_buf_size(self.max_head_bytes.max(MIN_HEAD_BYTES))
            .max_headers(self.max_header_fields)
            .keep_alive(true);
        let asked = Arc::new(AtomicBool::new(false));
        let first = asked.clone();
        let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
            first.store(true, Ordering::Relaxed);
            hyper::service::Service::call(&service, request)
        });
        let connection = http.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        // The time for a head would count while a connection idles, so it is that for idling, and a
        // connection that sends no first head in time is closed here.
        let silent = async {
            sleep(self.head_time).await;
            if asked.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
        };
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = silent => return,
            () = until(&mut self.ends, |ending| ending != Ending::No) => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    result = connection.as_mut() => result,
                    () = until(&mut self.ends, |ending| ending == Ending::Now) => return,
                }
            }
        };
        if let Err(error) = result {
            tracing::debug!(%error, "a connection ended");
        }
    }
}

/// Returns once `ends` is as wanted, or nobody can say so any more.
async fn until(ends: &mut watch::Receiver<Ending>, wanted: impl Fn(Ending) -> bool) {
    let _ = ends.wait_for(|ending| wanted(*ending)).await;
}
