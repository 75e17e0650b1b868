//! ssh's own words, and what to do about them.

#[cfg(test)]
mod tests;

/// Foreign text made safe for a terminal: control characters are shown, not obeyed. Tabs stay.
pub fn shown(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\t' => plain.push('\t'),
            letter if letter.is_control() || is_invisible(letter) => plain.extend(letter.escape_default()),
            letter => plain.push(letter),
        }
    }
    plain
}

/// Characters that reverse the order of others, or hide them.
fn is_invisible(letter: char) -> bool {
    matches!(letter, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The kind of a failure of ssh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The user must correct something: ssh, its configuration or the host.
    Mistake,
    /// The host may be there again later.
    Absent,
}

/// What shells and loaders say of a program that is built for another processor, system or C library.
const OF_ANOTHER_SYSTEM: [&str; 4] =
    ["Exec format error", "cannot execute binary file", "ad CPU type in executable", "version `GLIBC"];

/// What to do after ssh, or the command at `host`, has printed `words`; `None` if they are not
/// known.
pub fn hint(host: &str, words: &str) -> Option<(Trouble, String)> {
    let has = |text: &str| words.contains(text);
    let mistake = |text: String| Some((Trouble::Mistake, text));
    let absent = |text: String| Some((Trouble::Absent, text));
    match () {
        () if has("Bad configuration option")
            || has("bad configuration options")
            || has("Can't open user config file") =>
        {
            mistake("ssh cannot read its configuration: see the line that it names".to_owned())
        }
        () if has("UNPROTECTED PRIVATE KEY FILE") || has("Bad owner or permissions on") => {
            mistake("ssh wants its files to be yours alone: `chmod 600` the file that it names".to_owned())
        }
        () if has("REMOTE HOST IDENTIFICATION HAS CHANGED") => mistake(format!(
            "{host} has another key than the last time: if it was set up anew, `ssh-keygen -R {host}`, then connect once by hand"
        )),
        () if has("Host key verification failed") || has("host key is known for") => {
            mistake(format!("connect once by hand and accept its key: `ssh {host}`"))
        }
        () if has("Too many authentication failures") => mistake(format!(
            "ssh offers too many keys: name the right one in ~/.ssh/config (IdentityFile, IdentitiesOnly yes) for {host}"
        )),
        () if (has("Permission denied (") && !has("Permission denied (os error"))
            || has("Permission denied, please try again") =>
        {
            mistake(format!(
                "ssh must work without a password: `ssh-copy-id {host}`, then `ssh -o BatchMode=yes {host} true`"
            ))
        }
        () if has("no matching ") && has("found") => {
            mistake(format!("this ssh and the one of {host} know no common way: bring the older of the two up to date"))
        }
        () if has("resolve hostname") => {
            mistake(format!("is the name right? A Mac is also called {host}.local; aliases belong in ~/.ssh/config"))
        }
        () if has("password has expired") || has("change your password") => {
            mistake(format!("log in to {host} by hand once and give the user a new password"))
        }
        () if has("account is currently not available") || has("account is not available") => {
            mistake(format!("the user has no login shell at {host}: name another user in ~/.ssh/config"))
        }
        () if OF_ANOTHER_SYSTEM.iter().any(|text| has(text)) => mistake(format!(
            "this program is built for another system than that of {host}: build it there, and name its place with --program instead of --copy"
        )),
        () if has("No space left on device") || has("Disk quota exceeded") => {
            mistake(format!("the disk of {host} is full: `ssh {host} df -h .` shows what is free; make room there"))
        }
        () if has("Read-only file system") => mistake(format!("the home directory of {host} cannot be written to")),
        () if has("Connection refused") => absent(format!(
            "nothing answers ssh at that port of {host}: start sshd there (a Mac: System Settings, General, Sharing, Remote Login), or is it another port?"
        )),
        () if has("No route to host")
            || has("Network is unreachable")
            || has("Host is down")
            || has("Host is unreachable") =>
        {
            absent(format!("no network leads to {host}: is it awake, its cable in, and its address right?"))
        }
        () if has("timed out") || has("not responding") => absent(format!(
            "{host} says nothing: is it awake and on this network, and does a firewall let ssh through?"
        )),
        () if has("kex_exchange_identification") || has("Connection closed by") || has("Connection reset by") => {
            absent(format!(
                "the sshd of {host} closed the connection: too many at once (MaxStartups), or it bars this machine"
            ))
        }
        () => None,
    }
}

/// Lines of foreign text for the middle of a message: on one line, without control characters, cut
/// after 300.
pub(crate) fn one_line(text: &str) -> String {
    const LONGEST: usize = 300;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let line: String = lines.join("; ").chars().filter(|letter| !letter.is_control()).take(LONGEST).collect();
    if line.is_empty() { "it said nothing".into() } else { line }
}
