//! Which machine this is: two names that ssh takes may mean the same one.

use std::process::Command;

/// A text that all processes of this machine share until it restarts, and no other machine has.
/// Containers and network namespaces are machines of their own. `None` if the system does not tell.
pub fn machine() -> Option<String> {
    if cfg!(target_os = "macos") {
        let output = Command::new("/usr/sbin/sysctl").args(["-n", "kern.bootsessionuuid"]).output().ok()?;
        return plain(&String::from_utf8_lossy(&output.stdout));
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let network = std::fs::read_link("/proc/self/ns/net").ok()?;
    plain(&format!("{} {}", boot.trim(), network.display()))
}

/// The same text from a host's answer: the UUID of its start, perhaps with more. `None` for
/// anything else.
pub fn plain(text: &str) -> Option<String> {
    const UUID: usize = 36;
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let is_uuid = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    let starts = text.get(..UUID).is_some_and(is_uuid)
        && text.len() < 2 * UUID
        && text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
    starts.then(|| text.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_knows_itself() {
        assert_eq!(machine(), machine());
        let boot = "0b5c8a4e-1111-4222-8333-444455556666";
        assert_eq!(plain(&format!("{boot}\nnet:[4026531840]\n")), plain(&format!("{boot} net:[4026531840]")));
        assert_ne!(plain(&format!("{boot} net:[1]")), plain(&format!("{boot} net:[2]")));
        assert_eq!(plain("hw.model: Mac16,11\nhw.memsize: 68719476736\n"), None);
        assert_eq!(plain(""), None);
    }
}
