//! Quoting for shells: everything that is sent to a host is data, whatever characters it has.
//!
//! sshd hands a command line to the user's login shell, which may be sh, bash, zsh, fish or tcsh.
//! They differ in their quoting. So the line is `sh -c '…' finetune MARK 'SCRIPT'`, in which no
//! character has a special meaning for any of them. There is no quote, exclamation mark or line
//! break inside the quotes. Every other unusual byte is an octal number, which `printf %b` of the
//! POSIX shell decodes.

use std::fmt::Write;
use std::path::Path;

#[cfg(test)]
mod tests;

/// One word for a POSIX shell.
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A path as one word for a POSIX shell. A path that begins with a dash does not become an option.
pub(crate) fn path_word(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.starts_with('-') { quoted(&format!("./{text}")) } else { quoted(&text) }
}

/// A line for any login shell, which runs `script` in the POSIX shell. `mark` is the script's `$1`:
/// by it the process is recognized. It has letters, digits and dashes only.
pub(crate) fn line(mark: &str, script: &str) -> String {
    assert!(mark.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'), "a mark is a plain word");
    format!("sh -c 'eval \"$(printf %b \"$2\")\"' finetune {mark} '{}'", octal(script))
}

/// Every byte but plain letters as `\0ooo`.
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
