//! From a discovery to the commands that make the Thunderbolt cables usable: the bridge off, an
//! address at each end of each cable, a route through it.
//!
//! What `mlx.distributed_config` does, with three differences: nothing is done twice (a cable that
//! has addresses keeps them), the addresses keep clear of the networks that the hosts are on, and a
//! plan that would cut off our own way to a host is refused. Nothing outlives a restart of the Mac.

use std::net::{IpAddr, Ipv4Addr};

use finetune_advice::Advice;
use finetune_launch::gather::{GatherError, Output};

use crate::cabling::End;
use crate::discover::Discovery;
use crate::facts::{Facts, Medium, System};
use addresses::AddressedCable;

mod addresses;

#[cfg(test)]
mod tests;

/// One command at one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The name that ssh takes.
    pub host: String,
    /// For a POSIX shell; with `sudo -n` where it needs root, so that it fails instead of waiting
    /// for a password.
    pub command: String,
    /// What it is for, in a few words.
    pub why: String,
    /// Whether it needs root.
    pub needs_root: bool,
}

/// What is to be done.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// In the order to run them; none if all is set up.
    pub steps: Vec<Step>,
    /// Hints: what only a person can do (Recovery, cables), and what is worth knowing.
    pub by_hand: Vec<String>,
}

/// A cluster that cannot be set up.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SetupError {
    /// There is no host to set up.
    #[error("no host answered")]
    NoHosts,
    /// Two names lead to one machine.
    #[error("{} and {} are the same machine", .0, .1)]
    SameMachine(String, String),
    /// The commands would take down the interface that our ssh connection uses.
    #[error("ssh reaches {host} at {address}, which is on {interface}: setting it up would cut that connection")]
    WayIn {
        /// The host.
        host: String,
        /// The address that ssh reaches it at.
        address: IpAddr,
        /// The interface that has this address.
        interface: String,
    },
    /// All ranges of addresses are taken.
    #[error("no addresses are left for {cables} cables that are outside of the networks of all hosts")]
    Addresses {
        /// Cables that need an address.
        cables: usize,
    },
}

impl Advice for SetupError {
    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::NoHosts => "`ssh -o BatchMode=yes HOST true` must succeed".to_owned(),
            Self::SameMachine(_, second) => format!("leave {second} out of the list"),
            Self::WayIn { host, .. } => {
                format!("use a name for {host} that leads over Ethernet or Wi-Fi, such as its address there")
            }
            Self::Addresses { .. } => "give the cables addresses by hand: docs/rdma.md says how".to_owned(),
        };
        vec![hint]
    }
}

/// The plan for what was found. Running it and discovering again gives a plan without steps.
///
/// # Errors
///
/// No host, one machine under two names, too many cables for the free addresses, or a step that
/// would cut our own connection to a host.
pub fn plan(discovery: &Discovery) -> Result<Plan, SetupError> {
    if discovery.hosts.is_empty() {
        return Err(SetupError::NoHosts);
    }
    if let Some((first, other)) = discovery.same_machine.first() {
        return Err(SetupError::SameMachine(first.clone(), other.clone()));
    }
    let mut plan = Plan::default();
    let cables = addresses::of_cables(discovery)?;
    for (host, facts) in discovery.hosts.iter().enumerate() {
        if facts.system != System::Mac {
            continue;
        }
        let first = plan.steps.len();
        let mut touched = take_bridges_down(discovery, host, &mut plan.steps);
        for (cable, side) in cables.iter().flat_map(|cable| (0..2).map(move |side| (cable, side))) {
            if cable.hosts[side] == host {
                touched.extend(set_up_end(discovery, cable, side, &mut plan.steps));
            }
        }
        refuse_to_cut_ourselves_off(facts, &touched)?;
        if plan.steps.len() > first && facts.root == Some(false) {
            plan.by_hand.push(format!(
                "{}: sudo asks for a password there, so --apply cannot run these commands; run them by hand or allow sudo without one",
                facts.host
            ));
        }
    }
    plan.by_hand.extend(discovery.hosts.iter().filter_map(recovery));
    plan.by_hand.extend(ends_without_an_interface(discovery));
    if !plan.steps.is_empty() {
        plan.by_hand.push("these settings last until a Mac restarts; then run this again".into());
    }
    Ok(plan)
}

/// Steps that take down every bridge of a host with a cabled member. Gives the bridges' names.
fn take_bridges_down(discovery: &Discovery, host: usize, steps: &mut Vec<Step>) -> Vec<String> {
    let facts = &discovery.hosts[host];
    let cabled = |interface: &str| {
        discovery.cabling.cables.iter().any(|cable| {
            cable
                .ends
                .iter()
                .zip(&cable.interfaces)
                .any(|(end, own)| end.host == host && own.as_deref() == Some(interface))
        })
    };
    let mut touched = Vec::new();
    for bridge in facts.interfaces.iter().filter(|interface| interface.medium == Medium::Bridge) {
        if bridge.up && bridge.members.iter().any(|member| cabled(member)) {
            steps.push(root(
                facts,
                format!("ifconfig {} down", bridge.name),
                "a bridge over cables in a loop sends frames in circles",
            ));
            touched.push(bridge.name.clone());
        }
    }
    touched
}

/// Steps that give one end of a cable its address and its route, if it lacks them. Gives the
/// interface whose address changes.
fn set_up_end(discovery: &Discovery, cable: &AddressedCable, side: usize, steps: &mut Vec<Step>) -> Option<String> {
    let facts = &discovery.hosts[cable.hosts[side]];
    let (own, far, interface) = (cable.addresses[side], cable.addresses[1 - side], &cable.interfaces[side]);
    let peer = discovery.name(cable.hosts[1 - side]);
    let has_address = facts.interface(interface).is_some_and(|found| found.addresses == [(own, addresses::PREFIX)]);
    let mut touched = None;
    if !cable.kept && !has_address {
        steps.push(root(
            facts,
            format!("ifconfig {interface} inet {own} netmask {}", addresses::NETMASK),
            &format!("an address on the cable to {peer}: RDMA needs one, and TCP can use it"),
        ));
        touched = Some(interface.clone());
    }
    let route = facts.host_routes.iter().find(|(destination, _)| *destination == far);
    if route.map_or(!cable.kept, |(_, through)| through != interface) {
        // `change` if there is a route already, otherwise `add`.
        steps.push(root(
            facts,
            format!("route -n change {far} -interface {interface} || sudo -n route -n add -host {far} -interface {interface}"),
            &format!("what is for {far} goes through this cable"),
        ));
    }
    touched
}

/// Cable ends that get no address, because the network interface of their port is unknown.
fn ends_without_an_interface(discovery: &Discovery) -> Vec<String> {
    let ends = discovery.cabling.cables.iter().flat_map(|cable| cable.ends.iter().zip(&cable.interfaces));
    let unknown = ends.filter(|(_, interface)| interface.is_none());
    let sentence = |(end, _): (&End, &Option<String>)| {
        format!(
            "{}: the network interface of {} is unknown, so its cable gets no address: {}",
            discovery.name(end.host),
            discovery.socket(end.host, end.port),
            discovery.hosts[end.host].why("ports"),
        )
    };
    unknown.map(sentence).collect()
}

fn root(facts: &Facts, command: String, why: &str) -> Step {
    Step { host: facts.host.clone(), command: format!("sudo -n {command}"), why: why.to_owned(), needs_root: true }
}

fn refuse_to_cut_ourselves_off(facts: &Facts, touched: &[String]) -> Result<(), SetupError> {
    let Some(IpAddr::V4(address)) = facts.way_in else { return Ok(()) };
    let holds = |interface: &&crate::facts::Interface| interface.addresses.iter().any(|&(own, _)| own == address);
    match facts.interfaces.iter().find(holds) {
        Some(interface) if touched.contains(&interface.name) => Err(SetupError::WayIn {
            host: facts.host.clone(),
            address: address.into(),
            interface: interface.name.clone(),
        }),
        _ => Ok(()),
    }
}

/// What only Recovery can do, and only for Macs that have Thunderbolt 5: for others the switch
/// changes nothing.
fn recovery(facts: &Facts) -> Option<String> {
    let is_off = facts.rdma_enabled == Some(false) && facts.has_thunderbolt_5() != Some(false);
    is_off.then(|| {
        format!(
            "{}: RDMA is switched off. Shut down, hold the power button until the startup options appear, choose Options, then \
             Utilities, Terminal, type `rdma_ctl enable` and restart (newer macOS: System Settings, search for RDMA)",
            facts.host
        )
    })
}

/// What [`apply`] got done before something failed.
#[derive(Debug, thiserror::Error)]
#[error("{}: `{}` failed: {words}", failed.host, failed.command)]
pub struct ApplyError {
    /// The steps that were done.
    pub done: Vec<Step>,
    /// The step that failed.
    pub failed: Step,
    /// The command's own words, or ssh's.
    pub words: String,
    /// What was not tried.
    pub left: Vec<Step>,
}

impl Advice for ApplyError {
    /// Also what was done, and what was not.
    fn hints(&self) -> Vec<String> {
        let mut hints = Vec::new();
        if self.words.contains("password is required") || self.words.contains("a terminal is required") {
            hints.push(format!(
                "sudo asks for a password at {}: run the commands there by hand, or allow them without one (visudo)",
                self.failed.host
            ));
        }
        let commands =
            |steps: &[Step]| steps.iter().map(|step| format!("{}: {}", step.host, step.command)).collect::<Vec<_>>();
        if !self.done.is_empty() {
            hints.push(format!("done before that: {}", commands(&self.done).join("; ")));
        }
        if !self.left.is_empty() {
            hints.push(format!("not done: {}", commands(&self.left).join("; ")));
        }
        hints.push("once that is mended, the same command does what is left and nothing twice".into());
        hints
    }
}

/// Runs the steps one after the other with `run(host, command)`, such as
/// [`finetune_launch::gather::run_command`]. Gives the number of steps.
///
/// # Errors
///
/// The first step that fails. The steps after it are not run.
pub fn apply(
    plan: &Plan,
    run: &mut dyn FnMut(&str, &str) -> Result<Output, GatherError>,
) -> Result<usize, Box<ApplyError>> {
    for (index, step) in plan.steps.iter().enumerate() {
        let words = match run(&step.host, &step.command) {
            Ok(output) if output.succeeded => continue,
            Ok(output) if output.words.is_empty() => "it said nothing".to_owned(),
            Ok(output) => output.words,
            Err(error) => error.to_string(),
        };
        return Err(Box::new(ApplyError {
            done: plan.steps[..index].to_vec(),
            failed: step.clone(),
            words,
            left: plan.steps[index + 1..].to_vec(),
        }));
    }
    Ok(plan.steps.len())
}

/// The plan as text: a heading per host, the commands as they can be pasted, what they are for
/// behind a '#'.
pub fn text(plan: &Plan) -> String {
    let mut text = String::new();
    let mut host = "";
    for step in &plan.steps {
        if step.host != host {
            host = &step.host;
            text.push_str(&format!("{}{host}\n", if text.is_empty() { "" } else { "\n" }));
        }
        // By hand a password may be asked for.
        text.push_str(&format!("  # {}\n  {}\n", step.why, step.command.replace("sudo -n ", "sudo ")));
    }
    if plan.steps.is_empty() {
        text.push_str("Nothing is left to do by commands.\n");
    }
    for hint in &plan.by_hand {
        text.push_str(&format!("\n{hint}\n"));
    }
    text
}

/// Whether an address is one that a system gave itself: it changes with every plugging
/// (ml-explore/mlx issue 3467).
pub(crate) fn is_self_assigned(address: Ipv4Addr) -> bool {
    address.is_link_local()
}
