//! Any cut of the bytes reads as the whole, and what is wrong is refused.

use super::{Events, HttpError, Piece, Response};
use proptest::prelude::*;

/// What one response said.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Read {
    status: u16,
    content_type: String,
    keep_alive: bool,
    body: Vec<u8>,
    whole: bool,
}

/// Feeds `parts` one after the other, each response with a reader of its own, and closes.
fn read(parts: &[&[u8]]) -> Result<Vec<Read>, HttpError> {
    let (mut all, mut now, mut response) = (Vec::new(), Read::default(), Response::default());
    for mut part in parts.iter().copied() {
        loop {
            match response.next(&mut part)? {
                None if part.is_empty() => break,
                None => return Err(HttpError::CutShort("bytes after the end were left alone")),
                Some(Piece::Head(head)) => {
                    now.status = head.status;
                    now.content_type = head.content_type;
                    now.keep_alive = head.keep_alive;
                }
                Some(Piece::Body(bytes)) => now.body.extend_from_slice(bytes),
                Some(Piece::End) => {
                    now.whole = true;
                    all.push(std::mem::take(&mut now));
                    response = Response::default();
                }
            }
        }
    }
    if !response.is_untouched() {
        response.close()?;
        all.push(now);
    }
    Ok(all)
}

fn events(parts: &[&[u8]]) -> Vec<String> {
    let (mut reader, mut found) = (Events::default(), Vec::new());
    for part in parts {
        let taken = reader.push(part, |data| {
            found.push(String::from_utf8_lossy(data).into_owned());
            Ok::<(), HttpError>(())
        });
        taken.unwrap();
    }
    found
}

/// `bytes` in parts that end at `cuts`.
fn cut<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    ends.extend([0, bytes.len()]);
    ends.sort_unstable();
    ends.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect()
}

/// A body in chunks of these sizes, over and over.
fn chunked(body: &[u8], sizes: &[usize]) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), body);
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (chunk, after) = rest.split_at((*size).min(rest.len()));
        out.extend_from_slice(format!("{:X};name=\"x\"\r\n", chunk.len()).as_bytes());
        out.extend_from_slice(chunk);
        out.extend_from_slice(b"\r\n");
        rest = after;
    }
    out.extend_from_slice(b"0\r\nTrailer: of the body\r\n\r\n");
    out
}

proptest! {
    #[test]
    fn responses_are_read_alike_however_they_are_cut(
        responses in prop::collection::vec((100u16..600, prop::collection::vec(any::<u8>(), 0..300), any::<bool>(),
            prop::collection::vec(1usize..90, 1..4)), 1..4),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let (mut bytes, mut expected) = (Vec::new(), Vec::new());
        for (status, body, in_chunks, sizes) in &responses {
            bytes.extend_from_slice(format!("HTTP/1.1 {status} Reason of it\r\nContent-Type: Text/Plain; charset=x\r\n").as_bytes());
            let bodiless = [204, 304].contains(status) || *status < 200;
            if bodiless {
                bytes.extend_from_slice(b"\r\n");
            } else if *in_chunks {
                bytes.extend_from_slice(b"transfer-encoding:chunked\r\n\r\n");
                bytes.extend(chunked(body, sizes));
            } else {
                bytes.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
                bytes.extend_from_slice(body);
            }
            // Interim responses are passed over.
            if *status >= 200 {
                let body = if bodiless { Vec::new() } else { body.clone() };
                let content_type = "text/plain".to_owned();
                // Without a length a body lasts until the connection is closed, but these have one or none.
                expected.push(Read { status: *status, content_type, keep_alive: true, body, whole: true });
            }
        }
        let interim_last = responses.last().is_some_and(|response| response.0 < 200);
        match read(&cut(&bytes, &cuts)) {
            Ok(found) => prop_assert!(!interim_last && found == expected, "{found:?}\n{expected:?}"),
            Err(error) => prop_assert!(interim_last, "{error}"),
        }
    }

    #[test]
    fn events_are_read_alike_however_they_are_cut(
        lines in prop::collection::vec("(data|data:|data: |: |event: |id:)[ -~é☃]{0,20}", 0..20),
        ends in prop::collection::vec(0usize..3, 20),
        blank in prop::collection::vec(any::<bool>(), 20),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let (mut text, mut expected, mut data) = (String::new(), Vec::new(), Vec::new());
        for (i, line) in lines.iter().enumerate() {
            let end = ["\n", "\r\n", "\r"][ends[i]];
            text.push_str(line);
            text.push_str(end);
            if line == "data" {
                data.push("");
            } else if let Some(value) = line.strip_prefix("data:") {
                data.push(value.strip_prefix(' ').unwrap_or(value));
            }
            if blank[i] {
                // A `\n` here would be the second half of the line's own end.
                text.push_str(if end == "\r" { "\r" } else { end });
                if !data.is_empty() {
                    expected.push(std::mem::take(&mut data).join("\n"));
                }
            }
        }
        prop_assert_eq!(events(&cut(text.as_bytes(), &cuts)), expected);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8)) {
        let whole = read(&[&bytes]);
        prop_assert_eq!(read(&cut(&bytes, &cuts)).is_ok(), whole.is_ok());
        prop_assert_eq!(events(&cut(&bytes, &cuts)), events(&[&bytes]));
    }

    #[test]
    fn damaged_responses_are_read_or_refused_alike(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let mut bytes = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        prop_assert_eq!(read(&cut(&bytes, &cuts)), read(&[&bytes]));
    }
}

#[test]
fn every_part_of_a_response_is_understood() {
    let head = |text: &str| read(&[text.as_bytes()]).unwrap().remove(0);
    let until_close = head("HTTP/1.1 200 OK\r\n\r\nuntil the end");
    assert_eq!(
        (until_close.body.as_slice(), until_close.keep_alive),
        (&b"until the end"[..], false)
    );
    assert!(!head("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n").keep_alive);
    assert!(
        head("HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n").keep_alive
    );
    assert!(
        !head("HTTP/1.1 200 OK\r\nConnection: te, Close\r\nContent-Length: 0\r\n\r\n").keep_alive
    );
    // A reason is not needed, nor is a carriage return; the coding goes before the length.
    let both = head("HTTP/1.1 200\nContent-Length: 99\nTransfer-Encoding: Chunked\n\n1\nx\n0\n\n");
    assert_eq!((both.body.as_slice(), both.whole), (&b"x"[..], true));
    assert_eq!(read(&[b"\r\n\r\nHTTP/1.1 204 None\r\n\r\n"]).unwrap()[0].status, 204);
}

#[test]
fn what_is_no_response_is_refused() {
    let chunks = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let long = "x".repeat(70_000);
    let rows = [
        ("SSH-2.0-server\r\n".to_owned(), "status line"),
        ("HTTP/2 200\r\n\r\n".to_owned(), "status line"),
        ("HTTP/1.1 20 OK\r\n\r\n".to_owned(), "status line"),
        ("HTTP/1.1 099 OK\r\n\r\n".to_owned(), "status line"),
        ("HTTP/1.1 200 OK\r\nno colon\r\n\r\n".to_owned(), "no colon"),
        ("HTTP/1.1 200 OK\r\n: no name\r\n\r\n".to_owned(), "no name"),
        ("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n".to_owned(), "-1"),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_owned(),
            "Content-Length: 2",
        ),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n".to_owned(), "gzip"),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n\r\n".to_owned(), "br"),
        (format!("HTTP/1.1 200 OK\r\nX: {long}"), "longer than 16384"),
        (format!("HTTP/1.1 200 OK\r\n{}", "X: y\r\n".repeat(20_000)), "longer than 65536"),
        (format!("{chunks}-5\r\nhello"), "-5"),
        (format!("{chunks}\r\nhello"), "hexadecimal"),
        (format!("{chunks}fffffffffffffffff\r\n"), "hexadecimal"),
        (format!("{chunks}5 {long}"), "longer than 256"),
        (format!("{chunks}5\r\nhello!\r\n"), "longer than its length"),
        (format!("{chunks}5\r\nhello\r\n"), "within the body"),
        (format!("{chunks}5\r\nhell"), "within the body"),
        (format!("{chunks}0\r\n"), "within the body"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello".to_owned(), "within the body"),
        ("HTTP/1.1 200 OK\r\nContent-Le".to_owned(), "within the header"),
    ];
    for (text, words) in rows {
        let error = read(&[text.as_bytes()]).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
    assert_eq!(Response::default().close(), Err(HttpError::CutShort("before an answer")));
}

#[test]
fn an_event_has_a_limit() {
    let mut reader = Events::default();
    let line = vec![b'x'; 1 << 20];
    let mut pushed = 0;
    let error = loop {
        match reader.push(&line, |_| Ok::<(), HttpError>(())) {
            Ok(()) => pushed += 1,
            Err(error) => break error,
        }
        assert!(pushed < 10);
    };
    assert!(error.to_string().contains("an event is longer"), "{error}");
    // Many short lines of one event count together.
    let mut reader = Events::default();
    let lines = b"data: 0123456789\n".repeat(1 << 20);
    assert!(reader.push(&lines, |_| Ok::<(), HttpError>(())).is_err());
}

#[test]
fn events_end_at_empty_lines() {
    let found = events(&[b"\xEF\xBB\xBFdata: a\n\n: comment\n\nevent: x\nid: 1\n\ndata: b\ndata:  c\n\ndatabase: d\n\ndata\n\ndata: cut"]);
    assert_eq!(found, ["a", "b\n c", ""]);
    let mut reader = Events::default();
    reader.push(b"data: cut", |_| Ok::<(), HttpError>(())).unwrap();
    assert!(reader.is_cut_short());
    let fails = reader.push(b"\n\n", |_| Err::<(), HttpError>(HttpError::ChunkEnd));
    assert_eq!((fails, reader.is_cut_short()), (Err(HttpError::ChunkEnd), false));
}
