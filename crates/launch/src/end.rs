//! Ends a process at another host that does not react to orders, over a second connection.

use std::time::Duration;

use crate::gather::capture;
use crate::session::new_mark;
use crate::shell::{line, quoted};
use crate::ssh::Remote;

#[cfg(test)]
mod tests;

/// For the connection, a second look after a second, and the answer.
const DEADLINE: Duration = Duration::from_secs(6);

/// Whether a process is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Ended,
    /// The host does not answer, or the process is still there.
    Unknown,
}

/// Ends the command that was started with `mark` as process `process` of a host, with all its
/// children, also if it is stopped. Another process that has this number by now is left alone.
pub(crate) fn end(remote: &Remote, mark: &str, process: u32) -> Fate {
    let Ok(own) = new_mark() else { return Fate::Unknown };
    let ran = capture(&mut remote.ssh(&line(&own, &script(mark, process))), None, DEADLINE);
    let ended = ran.is_ok_and(|ran| String::from_utf8_lossy(&ran.output).lines().any(|line| line == "ended"));
    if ended { Fate::Ended } else { Fate::Unknown }
}

fn script(mark: &str, process: u32) -> String {
    format!(
        r#"process={process}
mark={}
named() {{
    ps -ww -o args= -p "$process" 2>/dev/null || tr '\0' ' ' <"/proc/$process/cmdline" 2>/dev/null
}}
ours() {{ case "$(named)" in *"$mark"*) return 0 ;; *) return 1 ;; esac; }}
if ours; then
    group=$(ps -o pgid= -p "$process" 2>/dev/null | tr -d ' ')
    [ -n "$group" ] && {{ kill -s KILL -- "-$group" || kill -s KILL "-$group"; }} 2>/dev/null
    kill -s KILL "$process" 2>/dev/null
    ours && sleep 1
fi
ours || echo ended
"#,
        quoted(mark)
    )
}
