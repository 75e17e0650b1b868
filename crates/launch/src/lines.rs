//! Lines out of bytes from untrusted processes: any bytes, any length.

/// Lines are cut at this length. No message of ours is longer, and no other process may fill our
/// memory.
pub(crate) const LONGEST_LINE: usize = 64 << 10;

/// The same for lines that begin with a control character. They are data between our own processes,
/// some 30 bytes per pair of ranks.
const LONGEST_DATA: usize = 4 << 20;

/// Puts lines together from pieces.
#[derive(Default)]
pub(crate) struct Lines {
    line: Vec<u8>,
    /// Bytes of the line that were dropped.
    lost: u64,
}

impl Lines {
    /// Takes the next bytes and hands every line that they complete to `say`, without its end.
    pub(crate) fn push(&mut self, mut bytes: &[u8], say: &mut dyn FnMut(String)) {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            self.keep(&bytes[..end]);
            bytes = &bytes[end + 1..];
            say(self.take());
        }
        self.keep(bytes);
    }

    /// Hands the bytes after the last end of a line to `say`, if there are any.
    pub(crate) fn finish(&mut self, say: &mut dyn FnMut(String)) {
        if !self.line.is_empty() || self.lost > 0 {
            say(self.take());
        }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let first = self.line.first().or(bytes.first());
        let most = if first == Some(&1) { LONGEST_DATA } else { LONGEST_LINE };
        let room = most.saturating_sub(self.line.len()).min(bytes.len());
        self.line.extend_from_slice(&bytes[..room]);
        self.lost += (bytes.len() - room) as u64;
    }

    fn take(&mut self) -> String {
        if self.line.last() == Some(&b'\r') {
            self.line.pop();
        }
        let mut text = String::from_utf8_lossy(&self.line).into_owned();
        if self.lost > 0 {
            text += &format!("… ({} more bytes)", self.lost);
        }
        self.line.clear();
        self.line.shrink_to(LONGEST_LINE);
        self.lost = 0;
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let (mut reader, mut lines) = (Lines::default(), Vec::new());
        pieces.iter().for_each(|piece| reader.push(piece, &mut |line| lines.push(line)));
        reader.finish(&mut |line| lines.push(line));
        lines
    }

    #[test]
    fn any_bytes_make_lines() {
        assert_eq!(lines(&[b"one\ntw", b"o\r\n\nthree"]), ["one", "two", "", "three"]);
        assert_eq!(lines(&[b"caf\xe9\nnext\n"]), ["caf\u{fffd}", "next"]);
        assert_eq!(lines(&[]), [""; 0]);
    }

    #[test]
    fn long_lines_are_cut_and_what_follows_is_whole() {
        let pieces: Vec<&[u8]> = std::iter::repeat_n(&[b'x'; 1000][..], 1000).chain([&b"\nnext\n"[..]]).collect();
        let found = lines(&pieces);
        assert_eq!(found[1], "next");
        assert!(found[0].starts_with("xxx") && found[0].ends_with("… (934464 more bytes)"), "{}", found[0].len());
        let data = [b"\x01".to_vec(), vec![b'y'; 100_000]].concat();
        assert_eq!(lines(&[&data])[0].len(), 100_001);
    }
}
