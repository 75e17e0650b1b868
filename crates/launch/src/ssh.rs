//! The command line of ssh, and what it runs at a host.

use std::path::PathBuf;
use std::process::Command;

use finetune_rendezvous::{Host, is_this_host};

use crate::shell::{path_word, quoted};

#[cfg(test)]
mod tests;

/// Where a worker runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerHost {
    /// On this host.
    Local,
    /// On another host, over the system's ssh.
    Ssh(Remote),
}

impl WorkerHost {
    /// Where the rank of a hostfile's host runs. `remote` says how it is started if that is not
    /// this host; its own `host` does not count.
    pub fn of(host: &Host, remote: &Remote) -> WorkerHost {
        if is_this_host(&host.ssh) {
            WorkerHost::Local
        } else {
            WorkerHost::Ssh(Remote { host: host.ssh.clone(), ..remote.clone() })
        }
    }

    /// How the worker is started on another host; none on this one.
    pub fn remote(&self) -> Option<&Remote> {
        match self {
            WorkerHost::Local => None,
            WorkerHost::Ssh(remote) => Some(remote),
        }
    }
}

/// How a program is started on another host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remote {
    /// What ssh connects to. [`finetune_rendezvous::Hostfile`] refuses a name that begins with a
    /// dash.
    pub host: String,
    /// The path of the program there.
    pub program: PathBuf,
    /// The folder that the program starts in; the home directory if none.
    pub directory: Option<PathBuf>,
    /// A configuration file for ssh, instead of the user's.
    pub config: Option<PathBuf>,
    /// Arguments that replace [`crate::workers::WorkerCommand::words`]: the program is a copy, with
    /// its files beside it.
    pub words: Option<Vec<String>>,
}

/// Options that the user's configuration does not change. ssh asks no questions. It makes no
/// terminal, which would echo what is sent. It runs no command and forwards no ports that are meant
/// for people. No connection stays and holds our pipes. Why a connection failed is said, and nothing more.
const OPTIONS: [&str; 17] = [
    "-T",
    "-o",
    "RequestTTY=no",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ControlMaster=no",
    "-o",
    "ClearAllForwardings=yes",
    "-o",
    "RemoteCommand=none",
    "-o",
    "LogLevel=INFO",
];

impl Remote {
    /// The one place that builds the command line of ssh: it runs `command` at the host.
    pub fn ssh(&self, command: &str) -> Command {
        let mut ssh = Command::new("ssh");
        if let Some(config) = &self.config {
            ssh.arg("-F").arg(config);
        }
        ssh.args(OPTIONS).arg("--").arg(&self.host).arg(command);
        ssh
    }

    /// What the POSIX shell at the host runs: the program in its folder, with arguments and
    /// variables.
    pub(crate) fn script(&self, arguments: &[String], environment: &[(String, String)]) -> String {
        // Files that the program makes beside a copy are the user's alone, as the copy is.
        let mut script = if self.words.is_some() { "umask 077\n".to_owned() } else { String::new() };
        if let Some(directory) = &self.directory {
            if directory.is_relative() {
                // Login files may have changed the folder: a relative one is below the home
                // directory.
                script += "cd || exit 2\n";
            }
            // With CDPATH set, cd would look elsewhere and print the folder's name.
            script += &format!("CDPATH= cd -- {} >/dev/null || exit 2\n", path_word(directory));
        }
        for (name, value) in environment {
            script += &format!("export {}\n", quoted(&format!("{name}={value}")));
        }
        let words: Vec<String> =
            [path_word(&self.program)].into_iter().chain(arguments.iter().map(|word| quoted(word))).collect();
        // The shell waits for the program instead of becoming it: so its exit code says which
        // signal ended it.
        script + &words.join(" ") + "\nexit $?"
    }
}
