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

    /// The sections that `Transcript` has of one Mac: (name, text).
    pub(crate) fn sections(&self, host: usize) -> Vec<(&'static str, String)> {
        let rdma = self.rdma[host];
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
            ("ports", self.ports_text()),
            ("interfaces", self.interfaces_text(host)),
            ("rdma", if rdma { "enabled\n" } else { "disabled\n" }.into()),
            ("devices", self.devices_text(host)),
            ("device_details", self.device_details_text(host)),
            ("power", " sleep                0\n autorestart          1\n".into()),
            ("firewall", "Firewall is disabled. (State = 0)\n".into()),
            ("listening", "tcp4       0      0  *.22                   *.*                    LISTEN\n".into()),
            ("root", String::new()),
            ("thunderbolt", self.thunderbolt_text(host)),
        ]
    }

    /// Port p is on interface en(p+2).
    fn interface(port: usize) -> String {
        format!("en{}", port + 2)
    }

    /// `networksetup -listallhardwareports`.
    fn ports_text(&self) -> String {
        let mut text = String::from("\nHardware Port: Ethernet\nDevice: en0\n\nHardware Port: Wi-Fi\nDevice: en1\n");
        for port in 0..self.ports {
            let (number, interface) = (port + 1, Self::interface(port));
            let _ = write!(
                text,
                "\nHardware Port: Thunderbolt {number}\nDevice: {interface}\nEthernet Address: 02:00:5e:00:53:0{port}\n"
            );
        }
        text.push_str(
            "\nHardware Port: Thunderbolt Bridge\nDevice: bridge0\n\nVLAN Configurations\n===================\n",
        );
        text
    }

    /// `ifconfig`.
    fn interfaces_text(&self, host: usize) -> String {
        let mut text = format!(
            "lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384\n\tinet 127.0.0.1 netmask 0xff000000\n\
             en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500\n\
             \tinet 192.168.1.{} netmask 0xffffff00 broadcast 192.168.1.255\n\tmedia: autoselect (1000baseT <full-duplex>)\n\
             \tstatus: active\n\
             en1: flags=8822<BROADCAST,SMART,SIMPLEX,MULTICAST> mtu 1500\n\tstatus: inactive\n",
            11 + host
        );
        let mut members = String::new();
        for port in 0..self.ports {
            let interface = Self::interface(port);
            let _ = writeln!(text, "{interface}: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500");
            if let Some((address, prefix)) = self.addresses.get(&(host, port)) {
                let _ = writeln!(text, "\tinet {address} netmask 0x{:08x}", u32::MAX << (32 - prefix));
            }
            let is_cabled = self.far((host, port)).is_some();
            let _ = writeln!(text, "\tstatus: {}", if is_cabled { "active" } else { "inactive" });
            let _ = writeln!(members, "\tmember: {interface} flags=3<LEARNING,DISCOVER>");
        }
        let flags = if self.bridge[host] { "8863<UP,BROADCAST,SMART,RUNNING>" } else { "8822<BROADCAST,SMART>" };
        let _ = write!(text, "bridge0: flags={flags} mtu 1500\n{members}\tstatus: active\n");
        text
    }

    /// `ibv_devices`.
    fn devices_text(&self, host: usize) -> String {
        let mut text = String::from("    device          \t   node GUID\n    ------          \t----------------\n");
        if self.rdma[host] {
            for port in 0..self.ports {
                let _ = writeln!(text, "    rdma_{}        \te{port}c5797d9c8fac05", Self::interface(port));
            }
        }
        text
    }

    /// `ibv_devinfo -v`, as far as it is read.
    fn device_details_text(&self, host: usize) -> String {
        let mut text = String::new();
        if !self.rdma[host] {
            return text;
        }
        for port in 0..self.ports {
            let works = self.far((host, port)).is_some_and(|far| self.rdma[far.0]);
            let state = if works { "PORT_ACTIVE (4)" } else { "PORT_DOWN (1)" };
            let _ = write!(
                text,
                "hca_id:\trdma_{}\n\ttransport:\t\t\tThunderbolt (100)\n\t\tport:\t1\n\t\t\tstate:\t\t\t{state}\n",
                Self::interface(port)
            );
            let _ = writeln!(text, "\t\t\tGID[  0]:\t\tfe80::344d:4ff:feea:4e4{port}");
            if let Some((address, _)) = self.addresses.get(&(host, port)) {
                let _ = writeln!(text, "\t\t\tGID[  1]:\t\t::ffff:{address}");
            }
            text.push('\n');
        }
        text
    }

    /// `system_profiler SPThunderboltDataType -json`.
    fn thunderbolt_text(&self, host: usize) -> String {
        let buses: Vec<String> = (0..self.ports).map(|port| self.bus((host, port))).collect();
        format!(r#"{{"SPThunderboltDataType": [{}]}}"#, buses.join(","))
    }

    /// One port, and the Mac at the other end of its cable.
    fn bus(&self, socket: Socket) -> String {
        let (port, far) = (socket.1, self.far(socket));
        let items = far.map_or(String::new(), |far| {
            let service =
                if self.rdma[far.0] { r#", {"_name": "unknown_xd_service", "protocol_id_key": 64087}"# } else { "" };
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
        let number = port + 1;
        format!(
            r#"{{{items} "_name": "thunderboltusb4_bus_{port}", "device_name_key": "Mac mini", "domain_uuid_key": "{}",
                    "receptacle_1_tag": {{"current_speed_key": "{speed}", "receptacle_id_key": "{number}",
                    "receptacle_status_key": "{status}"}}, "vendor_name_key": "Apple Inc."}}"#,
            Self::domain(socket)
        )
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
