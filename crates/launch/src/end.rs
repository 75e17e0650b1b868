//! Ends a process at another host that does not hear what it is told any more: over a connection of
//! its own.

use std::time::Duration;

use crate::gather::capture;
use crate::session::new_mark;
use crate::shell::{line, quoted};
use crate::ssh::Remote;

#[cfg(test)]
mod tests;

/// For all of it: the connection, a second look after a second, and the answer.
const DEADLINE: Duration = Duration::from_secs(6);

/// What has become of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Ended,
    /// Its host does not say, or it is still there.
    Unknown,
}

/// Ends the command that was started with `mark` as process `process` of a host, and all that it
/// has started: also where it is stopped. A process that has its number by now is left alone.
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
