import Foundation

public enum ElementType: String, Decodable, Sendable {
  case float32, float16, int64, int32, int8, bool

  public var bytes: Int {
    switch self {
    case .int64: 8
    case .float32, .int32: 4
    case .float16: 2
    case .int8, .bool: 1
    }
  }
}

/// Numbers in memory of a fixed place: a runtime may read and write them there.
public final class Tensor {
  public let type: ElementType
  public let shape: [Int]
  public let data: UnsafeMutableRawPointer
  private static let alignment = 64
  private let release: () -> Void

  /// Memory that somebody else owns until `release` is called.
  public init(_ type: ElementType, _ shape: [Int], data: UnsafeMutableRawPointer, release: @escaping () -> Void) {
    self.type = type
    self.shape = shape
    self.data = data
    self.release = release
  }

  /// Zeros, at a place that suits vector instructions. Throws where there is no memory for them.
  public convenience init(zeros type: ElementType, _ shape: [Int]) throws {
    let bytes = max(1, try Tensor.count(shape) * type.bytes)
    var place: UnsafeMutableRawPointer?
    guard posix_memalign(&place, Tensor.alignment, bytes) == 0, let data = place else {
      throw EdgewrightError("there is no memory for \(bytes) bytes; close other apps, or export with a shorter --max-context")
    }
    memset(data, 0, bytes)
    self.init(type, shape, data: data) { free(data) }
  }

  public static func ints(_ values: [Token], _ shape: [Int]) throws -> Tensor {
    let tensor = try Tensor(zeros: .int64, shape)
    tensor.fill(values)
    return tensor
  }

  deinit {
    release()
  }

  public var count: Int { shape.reduce(1, *) }

  public func values<Value>(_: Value.Type = Value.self) -> UnsafeMutableBufferPointer<Value> {
    UnsafeMutableBufferPointer(start: data.assumingMemoryBound(to: Value.self), count: count)
  }

  public func fill(_ tokens: [Token]) {
    let place = values(Int64.self)
    for (i, token) in tokens.enumerated() { place[i] = Int64(token) }
  }

  private static func count(_ shape: [Int]) throws -> Int {
    var count = 1
    for size in shape {
      let (product, overflow) = count.multipliedReportingOverflow(by: size)
      guard size >= 0, !overflow, product < 1 << 48 else {
        throw EdgewrightError("a tensor of the shape \(shape) is larger than any memory; embed the bundle again")
      }
      count = product
    }
    return count
  }
}

extension Tensor {
  /// The numbers of a float tensor.
  public func floats() -> [Float] {
    type == .float16 ? values(UInt16.self).map(Half.float) : Array(values(Float.self))
  }

  /// The numbers of any other; a flag is 1 or 0.
  public func integers() -> [Int] {
    switch type {
    case .int64: values(Int64.self).map { Int($0) }
    case .int32: values(Int32.self).map { Int($0) }
    case .int8: values(Int8.self).map { Int($0) }
    default: values(UInt8.self).map { $0 == 0 ? 0 : 1 }
    }
  }
}

/// IEEE's binary16 by its bits: Swift's own Float16 is not there on every Mac.
public enum Half {
  public static func float(_ bits: UInt16) -> Float {
    let sign = UInt32(bits & 0x8000) << 16
    let (exponent, fraction) = (UInt32(bits >> 10 & 31), UInt32(bits & 1023))
    if exponent == 0 { return Float(sign: sign == 0 ? .plus : .minus, exponent: -24, significand: Float(fraction)) }
    let wide = exponent == 31 ? 255 : exponent + 112
    return Float(bitPattern: sign | wide << 23 | fraction << 13)
  }

  /// The nearest, of two as near the even one; what is too large is infinite.
  public static func bits(_ value: Float) -> UInt16 {
    let bits = value.bitPattern
    let sign = UInt16(bits >> 16 & 0x8000)
    let magnitude = bits & 0x7FFF_FFFF
    if magnitude > 0x7F80_0000 { return sign | 0x7E00 }
    if magnitude >= 0x4780_0000 { return sign | 0x7C00 }
    if magnitude < 0x3880_0000 {  // subnormal: adding 0.5 leaves the rounded fraction in the lowest bits
      return sign | UInt16(truncatingIfNeeded: (Float(bitPattern: magnitude) + 0.5).bitPattern)
    }
    return sign | UInt16(truncatingIfNeeded: (magnitude - (112 << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13)
  }
}
