//! Clusters for the tests. **Derived**: no machine printed these texts; they have the form of the
//! real ones in `tests/data` (an M4 Pro Mac mini has the ports Thunderbolt 1 to 3 on en2 to en4, as
//! in Apple's TN3205).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::Ipv4Addr;

use finetune_launch::Transcript;
use finetune_launch::gather::Output;

use crate::discover::Discovery;
use crate::facts::Facts;

/// A real output of `tests/data`.
macro_rules! data {
    ($file:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/", $file))
    };
}
pub(crate) use data;

/// A port: host and port, both from 0; port p is "Thunderbolt p+1" on en(p+2).
pub(crate) type Socket = (usize, usize);

/// Mac minis, cabled in any way.
#[derive(Clone)]
pub(crate) struct ExampleCluster {
    pub(crate) hosts: usize,
    pub(crate) ports: usize,
    pub(crate) cables: Vec<[Socket; 2]>,
    /// Whether bridge0 is up, over all Thunderbolt ports.
    pub(crate) bridge: Vec<bool>,
    pub(crate) rdma: Vec<bool>,
    /// "80 Gb/s" for Thunderbolt 5.
    pub(crate) gigabits: u32,
    pub(crate) addresses: BTreeMap<Socket, (Ipv4Addr, u8)>,
    /// The commands that were run on them.
    pub(crate) log: Vec<(String, String)>,
}

impl ExampleCluster {
    /// As they come out of the box: a bridge, RDMA switched on in Recovery, no addresses on the
    /// cables.
    pub(crate) fn new(hosts: usize, cables: &[[Socket; 2]]) -> Self {
        Self {
            hosts,
            ports: 3,
            cables: cables.to_vec(),
            bridge: vec![true; hosts],
            rdma: vec![true; hosts],
            gigabits: 80,
            addresses: BTreeMap::new(),
            log: Vec::new(),
        }
    }

    /// The four-node mesh of TN3205.
    pub(crate) fn mesh_of_four() -> Self {
        let cables = [
            ((0, 0), (1, 0)),
            ((0, 1), (2, 0)),
            ((0, 2), (3, 0)),
            ((1, 1), (2, 1)),
            ((1, 2), (3, 1)),
            ((2, 2), (3, 2)),
        ];
        Self::new(4, &cables.map(|(a, b)| [a, b]))
    }

    /// The five-node ring of TN3205.
    pub(crate) fn ring_of_five() -> Self {
        let cables = [((0, 0), (1, 0)), ((0, 2), (2, 0)), ((1, 2), (3, 0)), ((3, 2), (4, 2)), ((4, 0), (2, 2))];
        Self::new(5, &cables.map(|(a, b)| [a, b]))
    }

    pub(crate) fn name(host: usize) -> String {
        format!("mini-{}", host + 1)
    }

    pub(crate) fn domain((host, port): Socket) -> String {
        format!("0000000{host:X}-0000-4000-8000-00000000000{port:X}")
    }

    pub(crate) fn facts(&self) -> Vec<Facts> {
        (0..self.hosts).map(|host| Facts::from_transcript(&Self::name(host), &self.transcript(host), 1.8e9)).collect()
    }

    pub(crate) fn discovery(&self) -> Discovery {
        Discovery::new(self.facts().into_iter().map(Ok).collect())
    }

    fn far(&self, socket: Socket) -> Option<Socket> {
        self.cables.iter().find_map(|&[a, b]| match socket {
            _ if socket == a => Some(b),
            _ if socket == b => Some(a),
            _ => None,
        })
    }

    pub(crate) fn transcript(&self, host: usize) -> Transcript {
        let sections = self.sections(host);
        let sections: Vec<(&str, &str)> = sections.iter().map(|(name, text)| (*name, text.as_str())).collect();
        Transcript::of(&sections)
    }

    pub(crate) fn sections(&self, host: usize) -> Vec<(&'static str, String)> {
        let rdma = self.rdma[host];
        let mut ports = String::from("\nHardware Port: Ethernet\nDevice: en0\n\nHardware Port: Wi-Fi\nDevice: en1\n");
        let mut buses = Vec::new();
        let mut devices = String::from("    device          \t   node GUID\n    ------          \t----------------\n");
        let (mut details, mut members) = (String::new(), String::new());
        let mut interfaces = format!(
            "lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384\n\tinet 127.0.0.1 netmask 0xff000000\n\
             en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500\n\
             \tinet 192.168.1.{} netmask 0xffffff00 broadcast 192.168.1.255\n\tmedia: autoselect (1000baseT <full-duplex>)\n\
             \tstatus: active\n\
             en1: flags=8822<BROADCAST,SMART,SIMPLEX,MULTICAST> mtu 1500\n\tstatus: inactive\n",
            11 + host
        );
        for port in 0..self.ports {
            let (number, interface, far) = (port + 1, format!("en{}", port + 2), self.far((host, port)));
            let _ = write!(
                ports,
                "\nHardware Port: Thunderbolt {number}\nDevice: {interface}\nEthernet Address: 02:00:5e:00:53:0{port}\n"
            );
            let items = far.map_or(String::new(), |far| {
                let service = if self.rdma[far.0] {
                    r#", {"_name": "unknown_xd_service", "protocol_id_key": 64087}"#
                } else {
                    ""
                };
                format!(
                    r#""_items": [{{"_name": "Mac mini", "device_name_key": "Mac16,11", "domain_uuid_key": "{}",
                        "services_title": [{{"_name": "service_ip", "protocol_id_key": 1}}{service}]}}],"#,
                    Self::domain(far)
                )
            });
            let (speed, status) = match far {
                Some(_) => (format!("{} Gb/s", self.gigabits), "receptacle_connected"),
                None if self.gigabits > 40 => ("Up to 120 Gb/s".into(), "receptacle_no_devices_connected"),
                None => ("Up to 40 Gb/s".into(), "receptacle_no_devices_connected"),
            };
            buses.push(format!(
                r#"{{{items} "_name": "thunderboltusb4_bus_{port}", "device_name_key": "Mac mini", "domain_uuid_key": "{}",
                    "receptacle_1_tag": {{"current_speed_key": "{speed}", "receptacle_id_key": "{number}",
                    "receptacle_status_key": "{status}"}}, "vendor_name_key": "Apple Inc."}}"#,
                Self::domain((host, port))
            ));
            let address = self.addresses.get(&(host, port));
            if rdma {
                let _ = writeln!(devices, "    rdma_{interface}        \te{port}c5797d9c8fac05");
                let works = far.is_some_and(|far| self.rdma[far.0]);
                let state = if works { "PORT_ACTIVE (4)" } else { "PORT_DOWN (1)" };
                let _ = write!(
                    details,
                    "hca_id:\trdma_{interface}\n\ttransport:\t\t\tThunderbolt (100)\n\t\tport:\t1\n\t\t\tstate:\t\t\t{state}\n"
                );
                let _ = writeln!(details, "\t\t\tGID[  0]:\t\tfe80::344d:4ff:feea:4e4{port}");
                if let Some((address, _)) = address {
                    let _ = writeln!(details, "\t\t\tGID[  1]:\t\t::ffff:{address}");
                }
                details.push('\n');
            }
            let _ =
                writeln!(interfaces, "{interface}: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500");
            if let Some((address, prefix)) = address {
                let _ = writeln!(interfaces, "\tinet {address} netmask 0x{:08x}", u32::MAX << (32 - prefix));
            }
            let _ = writeln!(interfaces, "\tstatus: {}", if far.is_some() { "active" } else { "inactive" });
            let _ = writeln!(members, "\tmember: {interface} flags=3<LEARNING,DISCOVER>");
        }
        let flags = if self.bridge[host] { "8863<UP,BROADCAST,SMART,RUNNING>" } else { "8822<BROADCAST,SMART>" };
        let _ = write!(interfaces, "bridge0: flags={flags} mtu 1500\n{members}\tstatus: active\n");
        ports.push_str(
            "\nHardware Port: Thunderbolt Bridge\nDevice: bridge0\n\nVLAN Configurations\n===================\n",
        );
        vec![
            ("system", "Darwin 25.5.0 arm64\n".into()),
            ("name", format!("{}.local\n", Self::name(host))),
            ("clock", "1800000000.N\n".into()),
            ("login", format!("192.168.1.2 50022 192.168.1.{} 22\n", 11 + host)),
            ("version", "finetune 0.1.0\n".into()),
            ("binary", "4038471504 41943040 /usr/local/bin/finetune\n".into()),
            ("disk", "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/disk3s5 482797652 1 210000000 1% /System/Volumes/Data\n".into()),
            ("files", "256\n".into()),
            ("release", "ProductName:\t\tmacOS\nProductVersion:\t\t26.5.1\nBuildVersion:\t\t25F80\n".into()),
            ("hardware", "hw.model: Mac16,11\nhw.memsize: 68719476736\nmachdep.cpu.brand_string: Apple M4 Pro\n".into()),
            ("ports", ports),
            ("interfaces", interfaces),
            ("rdma", if rdma { "enabled\n" } else { "disabled\n" }.into()),
            ("devices", devices),
            ("device_details", details),
            ("power", " sleep                0\n autorestart          1\n".into()),
            ("firewall", "Firewall is disabled. (State = 0)\n".into()),
            ("listening", "tcp4       0      0  *.22                   *.*                    LISTEN\n".into()),
            ("root", String::new()),
            ("thunderbolt", format!(r#"{{"SPThunderboltDataType": [{}]}}"#, buses.join(","))),
        ]
    }

    /// Does what a command of the set-up does to a Mac, as far as [`ExampleCluster::facts`] shows
    /// it.
    pub(crate) fn run(&mut self, host: &str, command: &str) -> Output {
        self.log.push((host.to_owned(), command.to_owned()));
        let index = (0..self.hosts).find(|&index| Self::name(index) == host).expect("a host of the cluster");
        let words: Vec<&str> = command.split_whitespace().collect();
        if command.contains("ifconfig bridge0 down") {
            self.bridge[index] = false;
        } else if let Some(at) = words.iter().position(|&word| word == "inet") {
            let port: usize = words[at - 1].trim_start_matches("en").parse().expect("an interface");
            let mask: Ipv4Addr = words[at + 3].trim_end_matches(';').parse().expect("a mask");
            let prefix = u32::from(mask).count_ones();
            let address = words[at + 1].parse().expect("an address");
            self.addresses.insert((index, port - 2), (address, u8::try_from(prefix).expect("a prefix")));
        }
        Output { succeeded: true, words: String::new() }
    }
}
