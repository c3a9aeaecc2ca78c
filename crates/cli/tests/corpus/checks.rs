//! What must hold of any stream of events, of those that the server writes and of bytes from anywhere; run by the fuzz
//! target `sse` and over the inputs that are kept. Whoever includes this has the reader as `crate::http`.

use crate::http::{Events, HttpError, Piece, Response};
use marlin_server::{event, named_event};

/// Head of a response whose body comes in chunks.
const HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const COMMENT: &[u8] = b": still here\n\n";

/// The events that were read, and whether it ended well.
type Read = (Vec<Vec<u8>>, Result<bool, HttpError>);

/// Everything at once reads as it does in any parts; what the server has written comes out as it went in.
pub fn sse(bytes: &[u8]) {
    // How it is read is no matter here, only that it is read alike.
    let _ = (alike(bytes, raw), alike(bytes, response), alike(&[HEAD, bytes].concat(), response));
    written(bytes);
}

fn collect(reader: &mut Events, bytes: &[u8], found: &mut Vec<Vec<u8>>) -> Result<(), HttpError> {
    reader.push(bytes, |data| {
        found.push(data.to_vec());
        Ok(())
    })
}

/// The events of a body.
fn raw(parts: &[&[u8]]) -> Read {
    let (mut reader, mut found) = (Events::default(), Vec::new());
    let result = parts.iter().try_for_each(|part| collect(&mut reader, part, &mut found));
    (found, result.map(|()| !reader.is_cut_short()))
}

/// The events of one response.
fn response(parts: &[&[u8]]) -> Read {
    let (mut response, mut events, mut found) =
        (Response::default(), Events::default(), Vec::new());
    let mut whole = false;
    let result = parts.iter().try_for_each(|part| {
        let mut part = *part;
        while let Some(piece) = response.next(&mut part)? {
            match piece {
                Piece::Head(head) => assert!((200..1000).contains(&head.status)),
                Piece::Body(bytes) => collect(&mut events, bytes, &mut found)?,
                Piece::End => whole = true,
            }
        }
        Ok(())
    });
    let closed = result.and_then(|()| response.close());
    (found, closed.map(|()| whole && !events.is_cut_short()))
}

/// Reads `bytes` whole and cut in several ways, the first byte among what decides where.
fn alike(bytes: &[u8], read: fn(&[&[u8]]) -> Read) -> Read {
    let whole = read(&[bytes]);
    let own = bytes.first().map_or(1, |byte| usize::from(*byte) + 1);
    for size in [1, 2, 3, 7, own] {
        let parts: Vec<&[u8]> = bytes.chunks(size).collect();
        assert_eq!(read(&parts), whole, "in parts of {size} bytes");
    }
    whole
}

/// Takes `bytes` for the texts of events, one in a line, and writes them as the server does.
fn written(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (mut stream, mut expected) = (HEAD.to_vec(), Vec::new());
    for (i, line) in text.split('\n').take(200).enumerate() {
        let mut body = Vec::new();
        match i % 3 {
            0 => event(&mut body, &line),
            1 => named_event(&mut body, "response.output_text.delta", &line),
            _ => {
                body.extend_from_slice(COMMENT);
                event(&mut body, &serde_json::json!({"choices": [{"delta": {"content": line}}]}));
            }
        }
        expected.push(line.to_owned());
        stream.extend_from_slice(format!("{:x}\r\n", body.len()).as_bytes());
        stream.extend_from_slice(&body);
        stream.extend_from_slice(b"\r\n");
    }
    stream.extend_from_slice(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    let (found, whole) = alike(&stream, response);
    assert_eq!(whole, Ok(true));
    let (done, found) = found.split_last().expect("the last event");
    assert_eq!(done, b"[DONE]");
    let text = |data: &Vec<u8>| {
        let value: serde_json::Value = serde_json::from_slice(data).expect("JSON");
        let content = value.pointer("/choices/0/delta/content").unwrap_or(&value);
        content.as_str().expect("a text").to_owned()
    };
    assert_eq!(found.iter().map(text).collect::<Vec<_>>(), expected);
}
