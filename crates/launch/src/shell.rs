//! Words for shells: everything that a host is told is data, whatever it has in it.
//!
//! sshd hands a command line to the user's login shell, which may be any: sh, bash, zsh, fish,
//! tcsh. They agree on little, so the line that they get is `sh -c '…' finetune MARK 'SCRIPT'` with
//! nothing in it that one of them reads in its own way: no quote, exclamation mark or line break
//! inside the quotes, and every other unusual byte as an octal number that `printf %b` of the POSIX
//! shell turns back.

use std::fmt::Write;
use std::path::Path;

#[cfg(test)]
mod tests;

/// One word for a POSIX shell.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A path as one word for a POSIX shell; one that begins with a dash is still no option.
pub(crate) fn path_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.starts_with('-') { quoted(&format!("./{text}")) } else { quoted(&text) }
}

/// A line for any login shell, which runs `script` by the POSIX shell. `mark`, letters, digits and
/// dashes, is the script's `$1`: the process can be known again by it.
pub(crate) fn line(mark: &str, script: &str) -> String {
    assert!(mark.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "a mark is a plain word");
    format!("sh -c 'eval \"$(printf %b \"$2\")\"' finetune {mark} '{}'", octal(script))
}

/// All but plain letters as `\0ooo`.
fn octal(text: &str) -> String {
    let mut plain = String::with_capacity(text.len() * 2);
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'/' | b',' | b':' | b'=' | b'+' | b'-' => {
                plain.push(char::from(byte));
            }
            other => {
                let _ = write!(plain, "\\0{other:03o}");
            }
        }
    }
    plain
}
