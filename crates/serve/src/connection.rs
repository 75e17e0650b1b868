//! Connections within bounds: how many there are, how long a request may take to come, and how long
//! a client may take nothing of its answer.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep};

use crate::settings::Bounds;

/// After the system could not give a connection.
const PAUSE: Duration = Duration::from_millis(50);

/// What a connection and the answers to its requests know of each other.
#[derive(Clone, Default)]
pub(crate) struct Connection(Arc<Requests>);

#[derive(Default)]
struct Requests {
    begun: AtomicUsize,
    ended: AtomicUsize,
}

/// As long as it lives the client waits for the server, and its request has no deadline.
pub(crate) struct Busy(Connection);

impl Connection {
    /// A request has come as a whole.
    pub(crate) fn busy(&self) -> Busy {
        self.0.begun.fetch_add(1, Ordering::SeqCst);
        Busy(self.clone())
    }

    fn begun(&self) -> usize {
        self.0.begun.load(Ordering::SeqCst)
    }

    fn is_busy(&self) -> bool {
        self.begun() != self.0.ended.load(Ordering::SeqCst)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.0.ended.fetch_add(1, Ordering::SeqCst);
    }
}

impl Connected<IncomingStream<'_, Door>> for Connection {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Connection {
        stream.io().connection.clone()
    }
}

/// Where connections come in.
pub(crate) struct Door {
    listener: TcpListener,
    bounds: Bounds,
    places: Arc<Semaphore>,
}

impl Door {
    pub(crate) fn new(listener: TcpListener, bounds: Bounds) -> Door {
        Door { listener, bounds, places: Arc::new(Semaphore::new(bounds.connections.max(1))) }
    }
}

impl Listener for Door {
    type Io = Socket;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Socket, SocketAddr) {
        loop {
            // The semaphore is never closed.
            let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { continue };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    // Events are small, and each should arrive at once.
                    let _ = stream.set_nodelay(true);
                    return (Socket::new(stream, self.bounds, place), address);
                }
                // No descriptors are left, or the client has left already.
                Err(_) => sleep(PAUSE).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection with deadlines.
pub(crate) struct Socket {
    stream: TcpStream,
    connection: Connection,
    bounds: Bounds,
    /// The deadline of the request that comes, and the requests that had come when it began.
    request: Option<(Pin<Box<Sleep>>, usize)>,
    /// The deadline of a client that takes nothing.
    stall: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

impl Socket {
    fn new(stream: TcpStream, bounds: Bounds, place: OwnedSemaphorePermit) -> Socket {
        Socket { stream, connection: Connection::default(), bounds, request: None, stall: None, _place: place }
    }

    /// What writing gives, or an error if the client has taken nothing for too long.
    fn unless_stalled<T>(
        &mut self,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match write(Pin::new(&mut self.stream), context) {
            Poll::Ready(result) => {
                self.stall = None;
                Poll::Ready(result)
            }
            Poll::Pending => {
                let deadline = self.stall.get_or_insert_with(|| Box::pin(sleep(self.bounds.stall)));
                deadline.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(result) = Pin::new(&mut self.stream).poll_read(context, buffer) {
            return Poll::Ready(result);
        }
        if self.connection.is_busy() {
            return Poll::Pending;
        }
        let begun = self.connection.begun();
        let limit = self.bounds.request;
        let deadline = match &mut self.request {
            Some((deadline, of)) if *of == begun => deadline,
            request => &mut request.insert((Box::pin(sleep(limit)), begun)).0,
        };
        deadline.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.unless_stalled(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::timeout;

    use super::*;

    const SHORT: Duration = Duration::from_millis(500);
    const DEADLINE: Duration = Duration::from_secs(60);

    /// Both ends of a connection: the server's, and the client's.
    async fn connected(bounds: Bounds) -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("an address")).await.expect("connected");
        let (stream, _) = listener.accept().await.expect("a client");
        let place = Arc::new(Semaphore::new(1)).acquire_owned().await.expect("a place");
        (Socket::new(stream, bounds, place), client)
    }

    async fn read(socket: &mut Socket) -> io::Result<usize> {
        let mut bytes = [0; 64];
        poll_fn(|context| {
            let mut buffer = ReadBuf::new(&mut bytes);
            Pin::new(&mut *socket).poll_read(context, &mut buffer).map_ok(|()| buffer.filled().len())
        })
        .await
    }

    #[tokio::test]
    async fn a_request_has_a_deadline_and_an_answer_has_none() {
        let (mut socket, client) = connected(Bounds { request: SHORT, ..Bounds::default() }).await;
        client.try_write(b"a request").expect("sent");
        assert_eq!(timeout(DEADLINE, read(&mut socket)).await.expect("it comes").expect("no error"), 9);
        let busy = socket.connection.busy();
        assert!(timeout(5 * SHORT, read(&mut socket)).await.is_err(), "the client waits, and may");
        drop(busy);
        let late = timeout(DEADLINE, read(&mut socket)).await.expect("it ends");
        assert_eq!(late.expect_err("too late").kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_left() {
        let (mut socket, _client) = connected(Bounds { stall: SHORT, ..Bounds::default() }).await;
        let bytes = vec![0; 1 << 20];
        let full = async {
            loop {
                let written = poll_fn(|context| Pin::new(&mut socket).poll_write(context, &bytes)).await;
                if let Err(error) = written {
                    return error.kind();
                }
            }
        };
        assert_eq!(timeout(DEADLINE, full).await.expect("it ends"), io::ErrorKind::TimedOut);
    }
}
