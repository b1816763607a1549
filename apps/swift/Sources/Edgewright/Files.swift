import Foundation

enum Files {
  static func read(_ file: URL) throws -> Data {
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: file.path, isDirectory: &isFolder), !isFolder.boolValue else {
      throw EdgewrightError("\(file.path) is missing; copy the whole folder that app.json lies in")
    }
    do {
      return try Data(contentsOf: file)
    } catch {
      throw EdgewrightError("\(file.path) cannot be read; look at its permissions")
    }
  }

  private static func length(of file: URL) -> Int? {
    guard let handle = try? FileHandle(forReadingFrom: file), let end = try? handle.seekToEnd() else { return nil }
    return Int(clamping: end)
  }

  /// Every file has the size and the hash that app.json says: damaged weights load without an error.
  static func check(_ files: [String: FileFact], in folder: URL, hashes: Bool, progress: LoadProgress) throws {
    let all = files.values.reduce(0) { $0 + $1.bytes }
    var done = 0
    for (name, fact) in files.sorted(by: { $0.key < $1.key }) {
      guard !name.hasPrefix("/"), !name.split(separator: "/").contains("..") else {
        throw EdgewrightError("app.json names a file outside its folder; embed the bundle again")
      }
      let file = folder.appendingPathComponent(name)
      guard let size = length(of: file) else {
        throw EdgewrightError("\(file.path) is missing; copy the whole folder that app.json lies in")
      }
      guard size == fact.bytes else {
        throw EdgewrightError("\(file.path) has \(size) bytes of \(fact.bytes); download it again")
      }
      guard hashes else { continue }
      let hash = try SHA256.hex(of: file) { read in progress(.checking(done: done + read, of: all)) }
      guard hash == fact.sha256 else {
        throw EdgewrightError("\(file.path) is damaged (its SHA-256 is not that of app.json); download it again")
      }
      done += fact.bytes
    }
  }
}

/// SHA-256 (FIPS 180-4).
struct SHA256 {
  private static let rounds: [UInt32] = [
    0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5, 0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5, 0xd807_aa98,
    0x1283_5b01, 0x2431_85be, 0x550c_7dc3, 0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174, 0xe49b_69c1, 0xefbe_4786,
    0x0fc1_9dc6, 0x240c_a1cc, 0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da, 0x983e_5152, 0xa831_c66d, 0xb003_27c8,
    0xbf59_7fc7, 0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967, 0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13,
    0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85, 0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3, 0xd192_e819,
    0xd699_0624, 0xf40e_3585, 0x106a_a070, 0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5, 0x391c_0cb3, 0x4ed8_aa4a,
    0x5b9c_ca4f, 0x682e_6ff3, 0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208, 0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7,
    0xc671_78f2,
  ]
  private static let chunk = 1 << 20

  private var state: [UInt32] = [
    0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
  ]
  private var held: [UInt8] = []
  private var bytes: UInt64 = 0

  /// The hash of a file, which is read in pieces. progress: bytes read so far.
  static func hex(of file: URL, progress: (Int) -> Void) throws -> String {
    var hash = SHA256()
    guard let handle = try? FileHandle(forReadingFrom: file) else {
      throw EdgewrightError("\(file.path) cannot be read; look at its permissions")
    }
    defer { try? handle.close() }
    var read = 0
    while true {
      let piece: Data
      do {
        piece = try handle.read(upToCount: chunk) ?? Data()
      } catch {
        throw EdgewrightError("\(file.path) cannot be read; look at the disk")
      }
      if piece.isEmpty { break }
      piece.withUnsafeBytes { hash.add($0) }
      read += piece.count
      progress(read)
    }
    return hash.finish()
  }

  mutating func add(_ data: UnsafeRawBufferPointer) {
    bytes += UInt64(data.count)
    var at = 0
    if !held.isEmpty {
      at = min(data.count, 64 - held.count)
      held.append(contentsOf: data[0..<at])
      guard held.count == 64 else { return }
      let block = held
      block.withUnsafeBytes { mix($0, blocks: 1) }
      held = []
    }
    let blocks = (data.count - at) / 64
    mix(UnsafeRawBufferPointer(rebasing: data[at...]), blocks: blocks)
    held.append(contentsOf: data[(at + 64 * blocks)...])
  }

  mutating func finish() -> String {
    let bits = bytes * 8
    var last: [UInt8] = [0x80]
    while (held.count + last.count) % 64 != 56 { last.append(0) }
    for shift in stride(from: 56, through: 0, by: -8) { last.append(UInt8(truncatingIfNeeded: bits >> UInt64(shift))) }
    last.withUnsafeBytes { add($0) }
    let digits = Array("0123456789abcdef")
    return String(
      state.flatMap { word in stride(from: 28, through: 0, by: -4).map { digits[Int(word >> UInt32($0)) & 15] } })
  }

  /// Blocks of 64 bytes, without checks of bounds within: a gigabyte is hashed before a model runs.
  private mutating func mix(_ data: UnsafeRawBufferPointer, blocks: Int) {
    var sums = state
    SHA256.rounds.withUnsafeBufferPointer { rounds in
      withUnsafeTemporaryAllocation(of: UInt32.self, capacity: 64) { schedule in
        sums.withUnsafeMutableBufferPointer { sums in
          for block in 0..<blocks { SHA256.mix(data, at: 64 * block, rounds, schedule, sums) }
        }
      }
    }
    state = sums
  }

  private static func turned(_ value: UInt32, _ by: UInt32) -> UInt32 { (value &>> by) | (value &<< (32 &- by)) }

  private static func mix(
    _ data: UnsafeRawBufferPointer, at: Int, _ rounds: UnsafeBufferPointer<UInt32>, _ w: UnsafeMutableBufferPointer<UInt32>,
    _ sums: UnsafeMutableBufferPointer<UInt32>
  ) {
    for i in 0..<16 {
      w[i] = UInt32(bigEndian: data.loadUnaligned(fromByteOffset: at &+ 4 &* i, as: UInt32.self))
    }
    for i in 16..<64 {
      let (x, y) = (w[i &- 15], w[i &- 2])
      let s0 = turned(x, 7) ^ turned(x, 18) ^ (x &>> 3)
      let s1 = turned(y, 17) ^ turned(y, 19) ^ (y &>> 10)
      w[i] = w[i &- 16] &+ s0 &+ w[i &- 7] &+ s1
    }
    var (a, b, c, d) = (sums[0], sums[1], sums[2], sums[3])
    var (e, f, g, h) = (sums[4], sums[5], sums[6], sums[7])
    for i in 0..<64 {
      let s1 = turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)
      let first = h &+ s1 &+ ((e & f) ^ (~e & g)) &+ rounds[i] &+ w[i]
      let s0 = turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)
      let second = s0 &+ ((a & b) ^ (a & c) ^ (b & c))
      (h, g, f, e) = (g, f, e, d &+ first)
      (d, c, b, a) = (c, b, a, first &+ second)
    }
    sums[0] &+= a
    sums[1] &+= b
    sums[2] &+= c
    sums[3] &+= d
    sums[4] &+= e
    sums[5] &+= f
    sums[6] &+= g
    sums[7] &+= h
  }
}
