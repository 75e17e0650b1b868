//! The tags of a template: where each begins and ends.

/// The pieces of a source with their places in it, in bytes: tags, and the text between them (see
/// [`is_code`]). Together they are the source. The text of a raw block is one piece.
pub(crate) struct Tags<'a> {
    source: &'a str,
    place: usize,
    raw: bool,
}

impl<'a> Tags<'a> {
    pub(crate) fn of(source: &'a str) -> Self {
        Self { source, place: 0, raw: false }
    }
}

impl<'a> Iterator for Tags<'a> {
    type Item = (usize, &'a str);

    fn next(&mut self) -> Option<Self::Item> {
        let (start, rest) = (self.place, &self.source[self.place..]);
        if rest.is_empty() {
            return None;
        }
        let length = if std::mem::take(&mut self.raw) && raw_end(rest) > 0 {
            raw_end(rest)
        } else {
            match (rest.as_bytes()[0], rest.as_bytes().get(1)) {
                (b'{', Some(b'#')) => rest.find("#}").map_or(rest.len(), |end| end + 2),
                (b'{', Some(b'{')) => tag_end(rest, b"}}"),
                (b'{', Some(b'%')) => tag_end(rest, b"%}"),
                (b'{', _) => 1,
                _ => rest.find('{').unwrap_or(rest.len()),
            }
        };
        let piece = &rest[..length];
        self.raw = tag_words(piece) == "raw";
        self.place += length;
        Some((start, piece))
    }
}

/// Whether a piece is a tag that holds code, not a comment.
pub(crate) fn is_code(piece: &str) -> bool {
    piece.starts_with("{{") || piece.starts_with("{%")
}

/// The length in bytes of the tag that `text` starts with. Strings and brackets within the tag may
/// hold its closing characters.
fn tag_end(text: &str, close: &[u8; 2]) -> usize {
    let bytes = text.as_bytes();
    let (mut place, mut depth) = (2, 0usize);
    while place < bytes.len() {
        if depth == 0 && bytes[place..].starts_with(close) {
            return place + 2;
        }
        match bytes[place] {
            b'"' | b'\'' => place = string_end(bytes, place) - 1,
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        place += 1;
    }
    bytes.len()
}

/// The place behind the string literal that starts at `place`: the end, if nothing closes the
/// literal.
pub(crate) fn string_end(bytes: &[u8], place: usize) -> usize {
    let mut end = place + 1;
    while end < bytes.len() && bytes[end] != bytes[place] {
        end += if bytes[end] == b'\\' { 2 } else { 1 };
    }
    (end + 1).min(bytes.len())
}

/// What a block tag holds, without its signs: `generation` of `{%- generation -%}`.
pub(crate) fn tag_words(tag: &str) -> &str {
    let Some(inner) = tag.strip_prefix("{%").and_then(|inner| inner.strip_suffix("%}")) else { return "" };
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    inner.strip_suffix(['-', '+']).unwrap_or(inner).trim()
}

/// Where the `endraw` tag of a raw block begins, of which `text` is the rest: the end, if there is
/// none.
fn raw_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(place) = text[from..].find("{%") {
        let start = from + place;
        if let Some(length) = text[start..].find("%}")
            && tag_words(&text[start..start + length + 2]) == "endraw"
        {
            return start;
        }
        from = start + 2;
    }
    text.len()
}
